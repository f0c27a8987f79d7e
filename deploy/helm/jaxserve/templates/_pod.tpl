{{- define "jaxserve.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "jaxserve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "jaxserve.labels" -}}
{{ include "jaxserve.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "jaxserve.mesh" -}}
{{- .Values.mesh | default (printf "1x%d" (max 1 (mul .Values.hosts .Values.gpus))) }}
{{- end }}

{{- define "jaxserve.volume" -}}
- name: {{ .name }}
  {{- if .claim.enabled }}
  persistentVolumeClaim: {claimName: {{ .claim.existingClaim | default (printf "%s-%s" (include "jaxserve.name" .root) .name) }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}

{{- define "jaxserve.secretVariable" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .from }}, key: {{ .key }}}}
{{- end }}

{{/* A pod template. `serves`: whether it answers HTTP, as a worker of a group does not. */}}
{{- define "jaxserve.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "jaxserve.labels" .root | nindent 4 }}
    {{- with $values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $values.gracefulTerminationTimeout 20 }}
  securityContext: {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: jaxserve
      image: {{ printf "%s:%s" $values.image.repository ($values.image.tag | default .root.Chart.AppVersion) }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args:
        - {{ printf "--model-id=%s" $values.model.id | quote }}
        {{- with $values.model.revision }}
        - {{ printf "--revision=%s" . | quote }}
        {{- end }}
        {{- with $values.model.servedName }}
        - {{ printf "--served-model-name=%s" . | quote }}
        {{- end }}
        - --mesh={{ include "jaxserve.mesh" .root }}
        - --port=3000
        - --compilation-cache-dir=/cache
        - --graceful-termination-timeout={{ $values.gracefulTerminationTimeout }}
        - --json-output
        {{- range $name, $value := $values.flags }}
        - {{ printf "--%s=%s" $name (kindIs "float64" $value | ternary (toJson $value) (toString $value)) | quote }}
        {{- end }}
      env:
        - {name: HF_HOME, value: /data}
        - {name: HOME, value: /tmp}
        {{- if not $values.gpus }}
        - {name: JAX_PLATFORMS, value: cpu}
        {{- end }}
        {{- with $values.hubToken }}{{ if .secret }}
        {{- include "jaxserve.secretVariable" (dict "name" "HF_TOKEN" "from" .secret "key" .key) | nindent 8 }}
        {{- end }}{{ end }}
        {{- with $values.apiKey }}{{ if .secret }}
        {{- include "jaxserve.secretVariable" (dict "name" "API_KEY" "from" .secret "key" .key) | nindent 8 }}
        {{- end }}{{ end }}
        {{- if gt (int $values.hosts) 1 }}
        {{- $secret := $values.clusterSecret.secret | default (printf "%s-cluster" (include "jaxserve.name" .root)) }}
        {{- include "jaxserve.secretVariable" (dict "name" "CLUSTER_SECRET" "from" $secret "key" $values.clusterSecret.key) | nindent 8 }}
        {{- end }}
        {{- with $values.env }}{{ toYaml . | nindent 8 }}{{ end }}
      resources:
        {{- $gpus := gt (int $values.gpus) 0 | ternary (dict $values.gpuResource $values.gpus) dict }}
        {{- toYaml (mergeOverwrite (dict "limits" (dict) "requests" (dict)) (deepCopy $values.resources) (dict "limits" $gpus "requests" $gpus)) | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      {{- if .serves }}
      ports:
        - {name: http, containerPort: 3000}
      livenessProbe:
        httpGet: {path: /health/live, port: http}
        initialDelaySeconds: 10
        {{- toYaml $values.probes.liveness | nindent 8 }}
      readinessProbe:
        httpGet: {path: /health/ready, port: http}
        {{- toYaml $values.probes.readiness | nindent 8 }}
      lifecycle:
        # Routers learn that the pod leaves before it refuses connections.
        preStop: {exec: {command: [sleep, "5"]}}
      {{- end }}
      volumeMounts:
        - {name: weights, mountPath: /data}
        - {name: compile-cache, mountPath: /cache}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: temporary, mountPath: /tmp}
  volumes:
    {{- include "jaxserve.volume" (dict "root" .root "name" "weights" "claim" $values.weights) | nindent 4 }}
    {{- include "jaxserve.volume" (dict "root" .root "name" "compile-cache" "claim" $values.compileCache) | nindent 4 }}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory }}}
    - name: temporary
      emptyDir: {}
{{- end }}
