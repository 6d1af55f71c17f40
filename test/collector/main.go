// Command collector is the OpenTelemetry Collector with what the tests of
// exports need of it: its receiver of OTLP over HTTP and gRPC, and an exporter
// that writes what was received into a file before it is acknowledged. It is assembled
// from the project's modules, because its distributions are no modules.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/provider/fileprovider"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/exporter"
	"go.opentelemetry.io/collector/otelcol"
	"go.opentelemetry.io/collector/pdata/plog"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/service/telemetry"
	"go.uber.org/zap"
)

func main() {
	cmd := otelcol.NewCommand(otelcol.CollectorSettings{
		BuildInfo: component.BuildInfo{Command: "collector", Description: "OpenTelemetry Collector for tests", Version: "test"},
		Factories: factories,
		ConfigProviderSettings: otelcol.ConfigProviderSettings{ResolverSettings: confmap.ResolverSettings{
			ProviderFactories: []confmap.ProviderFactory{fileprovider.NewFactory()}, DefaultScheme: "file",
		}},
	})
	if err := cmd.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func factories() (otelcol.Factories, error) {
	receivers, err := otelcol.MakeFactoryMap[receiver.Factory](otlpreceiver.NewFactory())
	if err != nil {
		return otelcol.Factories{}, fmt.Errorf("list the receivers: %w", err)
	}
	exporters, err := otelcol.MakeFactoryMap[exporter.Factory](exporter.NewFactory(component.MustNewType("lines"),
		func() component.Config { return &linesConfig{} }, exporter.WithLogs(newLines, component.StabilityLevelDevelopment)))
	if err != nil {
		return otelcol.Factories{}, fmt.Errorf("list the exporters: %w", err)
	}
	return otelcol.Factories{
		Receivers: receivers, Exporters: exporters,
		// The collector's own metrics and traces are of no interest, and what
		// exports them doubles the program.
		Telemetry: telemetry.NewFactory(func() component.Config { return &struct{}{} }, telemetry.WithCreateLogger(logger)),
	}, nil
}

func logger(context.Context, telemetry.LoggerSettings, component.Config) (*zap.Logger, component.ShutdownFunc, error) {
	l, err := zap.NewProduction()
	return l, nil, err
}

type linesConfig struct {
	Path string `mapstructure:"path"`
}

// Validate demands a path.
func (c *linesConfig) Validate() error {
	if c.Path == "" {
		return errors.New("lines: path is missing")
	}
	return nil
}

// lines appends each batch of logs to a file, as a line of OTLP's JSON.
type lines struct {
	path string
	mu   sync.Mutex
	f    *os.File
	enc  plog.JSONMarshaler
}

func newLines(_ context.Context, _ exporter.Settings, c component.Config) (exporter.Logs, error) {
	cfg, ok := c.(*linesConfig)
	if !ok {
		return nil, fmt.Errorf("lines: a configuration of type %T", c)
	}
	return &lines{path: cfg.Path}, nil
}

func (*lines) Capabilities() consumer.Capabilities { return consumer.Capabilities{} }

func (l *lines) Start(context.Context, component.Host) (err error) {
	if l.f, err = os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	// What was written when an earlier process was killed may have no end.
	_, err = l.f.WriteString("\n")
	return err
}

func (l *lines) Shutdown(context.Context) error { return l.f.Close() }

func (l *lines) ConsumeLogs(_ context.Context, logs plog.Logs) error {
	b, err := l.enc.MarshalLogs(logs)
	if err != nil {
		return fmt.Errorf("encode logs: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.f.Write(append(b, '\n'))
	return err
}
