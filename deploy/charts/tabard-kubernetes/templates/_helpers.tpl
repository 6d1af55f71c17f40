{{- define "tabard.labels" -}}
app.kubernetes.io/part-of: tabard
{{- end }}

{{- define "tabard.webhook.selector" -}}
app.kubernetes.io/name: tabard-webhook
{{- end }}
