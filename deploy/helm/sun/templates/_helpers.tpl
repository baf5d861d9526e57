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

{{- /* A model's instance group and parameters. A GPU is what executor cuda needs, and no other takes. */}}
{{- define "sun.onDevice" -}}
{{- if eq .device "gpu" }}
instance_group [{ kind: KIND_GPU, count: 1, gpus: [ {{ .gpu }} ] }]
{{- include "sun.parameters" (merge (deepCopy .parameters) (dict "executor" "cuda")) }}
{{- else }}
{{- .cpu }}
{{- include "sun.parameters" .parameters }}
{{- end }}
{{- end }}

{{- /* Of the server's container: with the GPUs that its models are placed on, one for each worker, and prefill on the first. */}}
{{- define "sun.resources" -}}
{{- $gpus := ternary (int .Values.workers.count) (ternary 1 0 (eq .Values.prefill.device "gpu")) (eq .Values.workers.device "gpu") }}
{{- $asked := ternary (dict "limits" (dict "nvidia.com/gpu" $gpus)) (dict) (gt $gpus 0) }}
{{- toYaml (merge (deepCopy .Values.resources) $asked) }}
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
{{- range $name, $model := dict "workers" .Values.workers "prefill" .Values.prefill }}
{{- if and (eq $model.device "cpu") (eq (toString $model.parameters.executor) "cuda") }}
{{- fail (printf "%s.device: must be gpu for %s.parameters.executor cuda, which a model on the CPU refuses" $name $name) }}
{{- end }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas: %v is more than maxReplicas, %v" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- end }}
