{{/* Rejects combinations of values, and what this cluster does not support; values.schema.json checks each value. */}}
{{- define "kirsa.checks" -}}
{{- $version := .Capabilities.KubeVersion.Version -}}
{{- if and (eq .Values.minting "impersonation") (semverCompare "<1.36.0-0" $version) -}}
{{- fail (printf "minting=impersonation needs Kubernetes 1.36 or newer, this cluster runs %s: set minting=direct" $version) -}}
{{- end -}}
{{- if and (semverCompare "<1.35.0-0" $version) (not .Values.agent.region) (not .Values.agent.stsEndpointUrl) -}}
{{- fail (printf "agent.region must be set: Kubernetes %s does not copy the region from nodes to pods" $version) -}}
{{- end -}}
{{- if not (has (.Values.agent.audience | default "sts.amazonaws.com") .Values.audiences) -}}
{{- fail "agent.audience must be one of audiences" -}}
{{- end -}}
{{- end -}}
