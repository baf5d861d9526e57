{{- define "sun.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "sun.selector" . }}
{{- end }}

{{- define "sun.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sun.name" -}}
{{ contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* Model parameters as config.pbtxt has them. Helm reads a number as a float, which would print 1048576 as 1.048576e+06. */}}
{{- define "sun.parameters" -}}
{{- range $key, $value := . }}
{{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}
{{- $value = int64 $value }}
{{- end }}
parameters { key: {{ $key | quote }} value { string_value: {{ $value | toString | quote }} } }
{{- end }}
{{- end }}

{{- /* MiB of /dev/shm, rounded up. The router's own bound, where it is not set (or 0), is the pools' sum. */}}
{{- define "sun.sharedMemoryMi" -}}
{{- $tokens := .Values.router.parameters.max_running_tokens | default (mul .Values.workers.count .Values.workers.parameters.kv_tokens) }}
{{- $kv := mul $tokens .Values.sharedMemory.bytesPerToken }}
{{- add (div (add $kv 1048575) 1048576) .Values.sharedMemory.tritonMi }}
{{- end }}

{{- /* What the schema cannot say. */}}
{{- define "sun.check" -}}
{{- if eq .Values.layout "split" }}
{{- fail "layout: split is not possible yet. A Deployment for each prefill task and one for the decode pool need KV to travel between pods, and prefill hands it over through the /dev/shm of one pod; the router needs to reach workers in other pods, and it calls models of its own tritonserver. A transport between hosts, remote workers over gRPC and a list of who they are are missing. Use layout: server, whose replicas are whole servers." }}
{{- end }}
{{- if and .Values.tasks.added (not .Values.tasks.volume) }}
{{- fail "tasks.volume: tasks.added names folders of it, and there is none" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas: %v is more than maxReplicas, %v" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- end }}
