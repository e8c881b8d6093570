{{/* Names are fixed: the resources are cluster-wide, so a cluster holds one installation. */}}

{{- define "probefleet.labels" -}}
app.kubernetes.io/name: probefleet
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end }}

{{/* (dict "root" $ "component" "agent") */}}
{{- define "probefleet.selector" -}}
app.kubernetes.io/name: probefleet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* (dict "root" $ "image" .Values.images.agent) */}}
{{- define "probefleet.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "probefleet.agentMemory" -}}
{{- $m := .Values.agent.memory -}}
{{ printf "%dMi" (add (int $m.baseMiB) (mul (int $m.policies) (int $m.mapMiBPerPolicy))) }}
{{- end }}

{{- define "probefleet.operatorAddress" -}}
{{ .Values.agent.operatorAddress | default (printf "probefleet-operator.%s.svc:8443" .Release.Namespace) }}
{{- end }}

{{/* What the restricted Pod Security profile asks of a pod. */}}
{{- define "probefleet.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* … and of its containers. */}}
{{- define "probefleet.restrictedContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
