{{/*
The chart has no objects of its own: files/ links to the kustomize base and its components, so that each object has a
single source. `helm package` puts them into the archive.
*/}}

{{/* Renders an object with the namespace and labels of this release. */}}
{{- define "kirsa.object" -}}
{{- $object := .object -}}
{{- $metadata := $object.metadata -}}
{{- $labels := dict
  "app.kubernetes.io/name" "kirsa"
  "app.kubernetes.io/part-of" "kirsa"
  "app.kubernetes.io/managed-by" .root.Release.Service
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) -}}
{{- $_ := set $metadata "labels" (merge $labels (default dict $metadata.labels)) -}}
{{- $clusterWide := list "ClusterRole" "ClusterRoleBinding" "ValidatingAdmissionPolicy" "ValidatingAdmissionPolicyBinding" -}}
{{- if eq $object.kind "Namespace" -}}
{{- $_ := set $metadata "name" .root.Release.Namespace -}}
{{- else if not (has $object.kind $clusterWide) -}}
{{- $_ := set $metadata "namespace" .root.Release.Namespace -}}
{{- end -}}
{{- range $object.subjects -}}
{{- if hasKey . "namespace" -}}
{{- $_ := set . "namespace" $.root.Release.Namespace -}}
{{- end -}}
{{- end -}}
{{ toYaml $object }}
{{- end -}}

{{/* Returns the text of a file of the base or a component. */}}
{{- define "kirsa.file" -}}
{{- required (printf "the chart lacks files/%s: files/ holds links, which this copy of the chart has lost" .file)
  (.root.Files.Get (printf "files/%s" .file)) -}}
{{- end -}}

{{/* Renders all objects of a file. */}}
{{- define "kirsa.objects" -}}
{{- range $document := splitList "\n---\n" (include "kirsa.file" .) }}
---
{{ include "kirsa.object" (dict "root" $.root "object" (fromYaml $document)) }}
{{- end }}
{{- end -}}

{{/* Returns the admin address if it differs from the agent's own default. */}}
{{- define "kirsa.adminAddress" -}}
{{- .Values.agent.adminAddress | default (ternary "[::]:8182" "" .Values.metrics.enabled) -}}
{{- end -}}

{{/* Returns the CEL expression that checks the audiences. */}}
{{- define "kirsa.audienceExpression" -}}
{{- if eq (len .Values.audiences) 1 -}}
object.spec.audiences == ['{{ first .Values.audiences }}']
{{- else -}}
object.spec.audiences.size() == 1 && object.spec.audiences[0] in ['{{ join "', '" .Values.audiences }}']
{{- end -}}
{{- end -}}
