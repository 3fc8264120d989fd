{{/* Names and labels, and what values may not contradict. */}}

{{- define "dbsam.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "dbsam.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dbsam.labels" -}}
{{ include "dbsam.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "dbsam.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "dbsam.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "dbsam.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository .Values.image.tag -}}
{{- end -}}
{{- end -}}

{{- define "dbsam.check" -}}
{{- if and .Values.models.existingClaim .Values.models.image -}}
{{- fail "models.existingClaim and models.image: set one of them" -}}
{{- end -}}
{{- if not (or .Values.models.existingClaim .Values.models.image) -}}
{{- fail "no model repository: set models.existingClaim or models.image" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) -}}
{{- fail "autoscaling.maxReplicas is smaller than minReplicas" -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- if not .Values.ingress.tlsSecret -}}
{{- fail "ingress.tlsSecret: images of patients go over TLS or not at all" -}}
{{- end -}}
{{- if not .Values.ingress.authentication -}}
{{- fail "ingress.authentication: say how clients are authenticated, the server itself has no login" -}}
{{- end -}}
{{- end -}}
{{- end -}}
