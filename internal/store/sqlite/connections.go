package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync"
	"time"

	"modernc.org/sqlite"
)

// connections are all that SQLite has open of one file. They can be closed
// together and opened anew without anybody who holds the sql.DB noticing more
// than a wait: connections of the old and of the new file must never be open at
// once, because the last of the old ones removes files by their names.
type connections struct {
	mu     sync.Mutex
	age    int           // connections of an earlier one are closed when they come back
	open   int           // how many there are
	barred chan struct{} // closed when connections may be opened again; nil if they may
	left   chan struct{} // told when one was closed
}

func newConnections() *connections { return &connections{left: make(chan struct{}, 1)} }

// pool returns a sql.DB of at most so many connections, which stay open.
func (c *connections) pool(dsn string, most int) (*sql.DB, error) {
	inner, err := sqlite.NewConnector(dsn)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(connector{inner, c})
	db.SetMaxOpenConns(most)
	db.SetMaxIdleConns(most)
	return db, nil
}

func (c *connections) enter(ctx context.Context) (age int, err error) {
	timeout := time.NewTimer(closing)
	defer timeout.Stop()
	for {
		c.mu.Lock()
		barred := c.barred
		if barred == nil {
			c.open++
			age = c.age
		}
		c.mu.Unlock()
		if barred == nil {
			return age, nil
		}
		select {
		case <-barred:
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-timeout.C:
			return 0, fmt.Errorf("the store's file has not been put back within %s", closing)
		}
	}
}

func (c *connections) leave() {
	c.mu.Lock()
	c.open--
	c.mu.Unlock()
	select {
	case c.left <- struct{}{}:
	default:
	}
}

func (c *connections) old(age int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return age != c.age
}

// bar has the connections of a pool closed, those that are at work when they
// have finished it, and lets none be opened until admit.
func (c *connections) bar(dbs ...*sql.DB) {
	c.mu.Lock()
	c.age++
	if c.barred == nil {
		c.barred = make(chan struct{})
	}
	c.mu.Unlock()
	for _, db := range dbs {
		db.SetMaxIdleConns(0)
		db.SetMaxIdleConns(db.Stats().MaxOpenConnections)
	}
}

func (c *connections) admit() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.barred != nil {
		close(c.barred)
		c.barred = nil
	}
}

// closing bounds the wait for connections that are at work.
const closing = 10 * time.Second

// wait returns when no more than so many connections are open.
func (c *connections) wait(ctx context.Context, most int) error {
	timeout := time.NewTimer(closing)
	defer timeout.Stop()
	for {
		c.mu.Lock()
		open := c.open
		c.mu.Unlock()
		if open <= most {
			return nil
		}
		select {
		case <-c.left:
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout.C:
			return fmt.Errorf("%d readers of the store did not end within %s", open-most, closing)
		}
	}
}

type connector struct {
	driver.Connector
	all *connections
}

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	age, err := c.all.enter(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		c.all.leave()
		return nil, err
	}
	inner, ok := conn.(conversant)
	if !ok {
		c.all.leave()
		return nil, errors.Join(errors.New("the SQLite driver lacks what its connections are used for"), conn.Close())
	}
	return &connection{conversant: inner, all: c.all, age: age}, nil
}

// conversant is all that database/sql asks a connection for.
type conversant interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

type connection struct {
	conversant
	all *connections
	age int
}

func (c *connection) ResetSession(ctx context.Context) error {
	if c.all.old(c.age) {
		return driver.ErrBadConn
	}
	return c.conversant.ResetSession(ctx)
}

func (c *connection) IsValid() bool { return !c.all.old(c.age) && c.conversant.IsValid() }

func (c *connection) Close() error {
	defer c.all.leave()
	return c.conversant.Close()
}
