"""JSON Schemas of what the manifests in cluster/ may say, written from the published references.

KubeRay: the API reference of `ray.io/v1`, RayClusterSpec and RayJobSpec as of 1.5.1 (authOptions is its newest field).
Kubernetes: the API reference of 1.32, PodTemplateSpec and `networking.k8s.io/v1`. SkyPilot: the reference of task YAML
as of 0.14. An unknown key is an error, as for `kubectl apply --validate=strict`. Of long objects only the fields that a
manifest of this project may want are here, so a schema never takes what the real one refuses.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
TEXT_MAP: Schema = {"type": "object", "additionalProperties": TEXT}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
# RFC 1123, in which names of objects have to be.
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
VARIABLE = "^[a-zA-Z_][a-zA-Z0-9_]*$"


def fields(required: tuple[str, ...] = (), **known: Schema) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = fields(
    ("name",), name=NAME, namespace=NAME, labels=TEXT_MAP, annotations=TEXT_MAP, generateName=TEXT
)
SELECTOR = fields(
    matchLabels=TEXT_MAP,
    matchExpressions=array(
        fields(
            ("key", "operator"),
            key=TEXT,
            operator=one_of("In", "NotIn", "Exists", "DoesNotExist"),
            values=TEXTS,
        )
    ),
)

# --- Pods (Kubernetes 1.32) ------------------------------------------------------------------------------------------

ENV = fields(
    ("name",),
    name=TEXT,
    value=TEXT,
    valueFrom=fields(
        secretKeyRef=fields(("key",), key=TEXT, name=TEXT, optional=FLAG),
        configMapKeyRef=fields(("key",), key=TEXT, name=TEXT, optional=FLAG),
        fieldRef=fields(("fieldPath",), fieldPath=TEXT, apiVersion=TEXT),
    ),
)
RESOURCES = fields(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
SECURITY = fields(
    allowPrivilegeEscalation=FLAG,
    capabilities=fields(add=TEXTS, drop=TEXTS),
    privileged=FLAG,
    readOnlyRootFilesystem=FLAG,
    runAsGroup=COUNT,
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    seccompProfile=fields(("type",), type=one_of("RuntimeDefault", "Unconfined", "Localhost")),
)
CONTAINER = fields(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=TEXTS,
    args=TEXTS,
    workingDir=TEXT,
    env=array(ENV),
    ports=array(
        fields(("containerPort",), containerPort=COUNT, name=NAME, protocol=one_of("TCP", "UDP", "SCTP"))
    ),
    resources=RESOURCES,
    securityContext=SECURITY,
    volumeMounts=array(fields(("name", "mountPath"), name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
VOLUME = fields(
    ("name",),
    name=NAME,
    persistentVolumeClaim=fields(("claimName",), claimName=NAME, readOnly=FLAG),
    emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    secret=fields(secretName=NAME, defaultMode=COUNT, optional=FLAG),
    configMap=fields(name=NAME, defaultMode=COUNT, optional=FLAG),
)
POD_TEMPLATE = fields(
    metadata=fields(labels=TEXT_MAP, annotations=TEXT_MAP, name=NAME),
    spec=fields(
        ("containers",),
        containers={**array(CONTAINER), "minItems": 1},
        initContainers=array(CONTAINER),
        volumes=array(VOLUME),
        automountServiceAccountToken=FLAG,
        imagePullSecrets=array(fields(("name",), name=NAME)),
        nodeSelector=TEXT_MAP,
        priorityClassName=TEXT,
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        securityContext={"type": "object"},
        serviceAccountName=NAME,
        terminationGracePeriodSeconds=COUNT,
        tolerations=array(fields(key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT, effect=TEXT)),
    ),
)

# --- KubeRay 1.5.1 ---------------------------------------------------------------------------------------------------

CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token")),
    suspend=FLAG,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        resources=RESOURCES,
        image=TEXT,
        imagePullPolicy=TEXT,
        env=array(ENV),
        securityContext=SECURITY,
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    ),
    headServiceAnnotations=TEXT_MAP,
    gcsFaultToleranceOptions={"type": "object"},
    headGroupSpec=fields(
        ("template",),
        template=POD_TEMPLATE,
        rayStartParams=TEXT_MAP,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=FLAG,
        headService={"type": "object"},
    ),
    workerGroupSpecs=array(
        fields(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            suspend=FLAG,
            rayStartParams=TEXT_MAP,
            template=POD_TEMPLATE,
            scaleStrategy=fields(workersToDelete=TEXTS),
        )
    ),
)
JOB_SPEC = fields(
    entrypoint=TEXT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    clusterSelector=TEXT_MAP,
    deletionStrategy={"type": "object"},
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    metadata=TEXT_MAP,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
)

# --- Network policies (Kubernetes 1.32) ------------------------------------------------------------------------------

PEER = fields(
    podSelector=SELECTOR,
    namespaceSelector=SELECTOR,
    ipBlock=fields(("cidr",), cidr=TEXT, **{"except": TEXTS}),
)
PORT = fields(port={"type": ["integer", "string"]}, endPort=COUNT, protocol=one_of("TCP", "UDP", "SCTP"))
POLICY_SPEC = fields(
    ("podSelector",),
    podSelector=SELECTOR,
    policyTypes=array(one_of("Ingress", "Egress")),
    ingress=array(fields(**{"from": array(PEER), "ports": array(PORT)})),
    egress=array(fields(to=array(PEER), ports=array(PORT))),
)


def _kind(api_version: str, kind: str, spec: Schema) -> Schema:
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=one_of(api_version),
        kind=one_of(kind),
        metadata=METADATA,
        spec=spec,
    )


KINDS = {
    "RayCluster": _kind("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": _kind("ray.io/v1", "RayJob", JOB_SPEC),
    "NetworkPolicy": _kind("networking.k8s.io/v1", "NetworkPolicy", POLICY_SPEC),
}

# --- SkyPilot 0.14 ---------------------------------------------------------------------------------------------------

_VARIABLES: Schema = {
    "type": "object",
    "patternProperties": {VARIABLE: {"type": ["string", "null"]}},
    "additionalProperties": False,
}
SKY_TASK = fields(
    ("resources", "run"),
    name=TEXT,
    workdir=TEXT,
    num_nodes={"type": "integer", "minimum": 1},
    resources=fields(
        accelerators={
            "anyOf": [TEXT, {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}}]
        },
        cpus={"type": ["string", "integer"]},
        memory={"type": ["string", "integer"]},
        disk_size={"type": ["string", "integer"]},
        image_id=TEXT,
        infra=TEXT,
        ports={"type": ["string", "integer", "array"]},
        use_spot=FLAG,
    ),
    envs=_VARIABLES,
    secrets=_VARIABLES,
    volumes={"type": "object", "patternProperties": {"^/": TEXT}, "additionalProperties": False},
    file_mounts={"type": "object"},
    setup=TEXT,
    run=TEXT,
)
