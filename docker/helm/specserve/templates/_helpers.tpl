{{- define "specserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "specserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "specserve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "specserve.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What a selector matches: never to be changed on an installed release. */}}
{{- define "specserve.selector" -}}
app.kubernetes.io/name: {{ include "specserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "specserve.labels" -}}
{{ include "specserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Whoever runs in a pod: nobody in particular, with nothing to gain. */}}
{{- define "specserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch # engines are large
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "specserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/*
specserve.toml: the values' tree, with engine.dir where the engines are mounted. A JSON value is a
TOML value too; toToml would write every whole number as a float.
*/}}
{{- define "specserve.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if .Values.engines.claim -}}
{{- $_ := set $config "engine" (merge (dict "dir" "/engines") ($config.engine | default dict)) -}}
{{- end -}}
{{- range $section, $values := $config }}
[{{ $section }}]
{{- range $key, $value := $values }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{ end }}
{{- end -}}

{{- define "specserve.envoy" -}}
{{- $host := printf "address: %s-replicas," (include "specserve.fullname" .) -}}
{{- .Files.Get "files/envoy.yaml" | replace "address: server," $host -}}
{{- end -}}
