"""The manifests of docker/kubernetes and docker/compose.yaml: every promise of docs/cluster.md about them, checked on
what kustomize makes of each overlay.

KubeRay's schema is not packaged anywhere that a test could take it from: what stands around our pods is held to the
field names of its v1 API reference below, and the pods themselves to Kubernetes' own schema.
"""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

OVERLAYS = [f"{size}/{kind}" for size in ("cpu", "gpu-1", "gpu-8") for kind in ("job", "cluster")]
OWN_DISKS = ["cpu/job-s3", "gpu-8/job-s3"]  # without a volume that pods share
KUBERNETES = "1.32"
USER = 10001  # of docker/Dockerfile
FIELDS = {  # of ray.io/v1, as far as they are of use to us
    "RayJob": {"entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
               "activeDeadlineSeconds", "backoffLimit", "submitterPodTemplate", "rayClusterSpec"},
    "cluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "head": {"serviceType", "rayStartParams", "template"},
    "worker": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


# --- kustomize, as far as our overlays use it -------------------------------------------------------------------------

def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization: its resources with its JSON patches applied."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}, "this builder knows no more"
    objects = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        (found,) = [each for each in objects if each["kind"] == patch["target"]["kind"]
                    and each["metadata"]["name"] == patch["target"]["name"]]
        steps = yaml.safe_load(patch["patch"])
        if isinstance(steps, dict):
            assert steps["$patch"] == "delete" and steps["metadata"]["name"] == found["metadata"]["name"], steps
            objects.remove(found)
            continue
        for step in steps:
            apply(found, step)
    return objects


def apply(target: Any, step: dict[str, Any]) -> None:
    """One JSON patch (RFC 6902); `replace` only where something is."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    for part in way:
        target = target[int(part)] if isinstance(target, list) else target[part]
    assert isinstance(target, dict) and step["op"] in ("add", "replace", "remove"), step
    assert (last in target) == (step["op"] != "add"), f"{step['path']}: {step['op']}"
    if step["op"] == "remove":
        del target[last]
    else:
        target[last] = step["value"]


@pytest.fixture(scope="module")
def built(repository: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: build(repository / "docker/kubernetes/overlays" / name) for name in OVERLAYS + OWN_DISKS}


def test_kustomize_makes_the_same_of_them(repository: Path, built) -> None:
    program = shutil.which("kustomize") or shutil.which("kubectl")
    if program is None:
        pytest.skip("neither kustomize nor kubectl is installed here")
    for name, objects in built.items():
        command = [program, "build" if program.endswith("kustomize") else "kustomize"]
        done = subprocess.run([*command, str(repository / "docker/kubernetes/overlays" / name)], capture_output=True,
                              text=True, check=True)

        def in_order(found: list[dict]) -> list[str]:
            return sorted(json.dumps(each, sort_keys=True) for each in found)

        assert in_order(list(yaml.safe_load_all(done.stdout))) == in_order(objects), name


# --- what is promised -------------------------------------------------------------------------------------------------

def of_kind(objects: list[dict], kind: str) -> list[dict]:
    return [each for each in objects if each["kind"] == kind]


def cluster_of(objects: list[dict]) -> dict[str, Any]:
    jobs = of_kind(objects, "RayJob")
    return jobs[0]["spec"]["rayClusterSpec"] if jobs else of_kind(objects, "RayCluster")[0]["spec"]


def pods_of(objects: list[dict]) -> dict[str, dict]:
    cluster = cluster_of(objects)
    pods = {"head": cluster["headGroupSpec"]["template"], "worker": cluster["workerGroupSpecs"][0]["template"]}
    for job in of_kind(objects, "RayJob"):
        pods["submitter"] = job["spec"]["submitterPodTemplate"]
    return pods


def problems(objects: list[dict], ray_version: str) -> list[str]:
    """What of our promises the objects of one overlay break."""
    found: list[str] = []

    def hold(what: str, kept: bool) -> None:
        if not kept:
            found.append(what)

    cluster, claims = cluster_of(objects), of_kind(objects, "PersistentVolumeClaim")
    head, (workers, *others) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    hold("KubeRay knows no such field of a cluster", set(cluster) <= FIELDS["cluster"])
    hold("KubeRay knows no such field of a group", set(head) <= FIELDS["head"] and set(workers) <= FIELDS["worker"])
    hold("Ray's version is not the pinned one", cluster["rayVersion"] == ray_version)
    hold("no token authentication", cluster.get("authOptions") == {"mode": "token"})
    hold("the autoscaler is on", cluster.get("enableInTreeAutoscaling") is False)
    hold("the gang has no fixed size", not others and workers["replicas"] == workers["minReplicas"]
         == workers["maxReplicas"])
    hold("the dashboard is open to the world", head["serviceType"] == "ClusterIP")
    for job in of_kind(objects, "RayJob"):
        spec = job["spec"]
        hold("KubeRay knows no such field of a job", set(spec) <= FIELDS["RayJob"])
        hold("no end: backoffLimit, activeDeadlineSeconds, ttlSecondsAfterFinished", all(
            isinstance(spec.get(name), int) and spec[name] > 0 for name in
            ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")))
        hold("the cluster stays", spec.get("shutdownAfterJobFinishes") is True)
        hold("the run folder is on no shared volume", not claims or " run_dir=/runs/" in spec["entrypoint"])
        hold("the run folder goes with its pod", bool(claims) or " run_dir=s3://" in spec["entrypoint"]
             and " storage.work_dir=/runs/" in spec["entrypoint"])
        hold("logs are on one pod's disk", bool(claims) or not re.search(r" data\.\w+=/", spec["entrypoint"]))
        asked = int(re.search(r"train\.workers=(\d+)", spec["entrypoint"])[1])
        container = workers["template"]["spec"]["containers"][0]
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        cpus = int(container["resources"]["limits"]["cpu"])
        hold("train.workers is not what the gang has room for", asked == workers["replicas"] * gpus if gpus
             else asked + 2 <= workers["replicas"] * cpus)
    images = {pod["spec"]["containers"][0]["image"] for pod in pods_of(objects).values()}
    hold("head, workers and submitter differ in their image", len(images) == 1)
    for name, pod in pods_of(objects).items():
        found += [f"{name}: {what}" for what in pod_problems(pod["spec"], name, own_disk=not claims)]
    for claim in claims:
        hold("pods of several nodes cannot share it", claim["spec"]["accessModes"] == ["ReadWriteMany"])
    return found


def pod_problems(pod: dict, name: str, own_disk: bool) -> list[str]:
    found: list[str] = []
    (container,), security = pod["containers"], pod.get("securityContext", {})
    if not (security.get("runAsNonRoot") is True and security.get("runAsUser") == USER):
        found.append("runs as root, or as a user that the image lacks")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("no seccomp profile")
    if container.get("securityContext") != {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}:
        found.append("may gain rights")
    if pod.get("automountServiceAccountToken") is not False:
        found.append("has a token of the Kubernetes API")
    resources = container.get("resources", {})
    if not ({"cpu", "memory"} <= set(resources.get("requests", {})) and {"memory"} <= set(resources.get("limits", {}))):
        found.append("no requests or limits")
    if name == "submitter":
        return found
    for key, gpu in resources["limits"].items():
        if key == "nvidia.com/gpu" and gpu != resources["requests"].get(key):
            found.append("requests and limits of GPUs differ")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    shm = mounts.get("/dev/shm", {}).get("emptyDir", {})
    if not (shm.get("medium") == "Memory" and shm.get("sizeLimit")):
        found.append("/dev/shm has no size")
    runs = {kind: value for kind, value in mounts.get("/runs", {}).items() if kind != "name"}
    if own_disk and not (runs.keys() == {"emptyDir"} and runs["emptyDir"].get("sizeLimit")):
        found.append("/runs is no disk of its own, of a size")
    if not own_disk and runs != {"persistentVolumeClaim": {"claimName": "watchtower-runs"}}:
        found.append("/runs is not the shared volume")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        # Paths that Ray answers without a token; KubeRay's own probes need wget, which the image lacks.
        if container.get(probe, {}).get("httpGet", {}).get("path") not in (
                "/api/local_raylet_healthz", "/api/gcs_healthz"):
            found.append(f"no {probe}")
    return found


@pytest.fixture(scope="module")
def ray_version(repository: Path) -> str:
    return re.search(r"^ray==(.+)$", (repository / "packaging/constraints-cpu.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("name", OVERLAYS + OWN_DISKS)
def test_overlays_keep_the_promises(built, ray_version: str, name: str) -> None:
    assert problems(built[name], ray_version) == []


def test_job_and_cluster_of_a_size_are_the_same_cluster(built) -> None:
    for size in ("cpu", "gpu-1", "gpu-8"):
        assert cluster_of(built[f"{size}/job"]) == cluster_of(built[f"{size}/cluster"])
    workers = {size: cluster_of(built[f"{size}/cluster"])["workerGroupSpecs"][0] for size in ("gpu-1", "gpu-8")}
    assert (workers["gpu-1"]["replicas"], workers["gpu-8"]["replicas"]) == (1, 8)


def test_core_objects_and_pods_are_of_kubernetes_schema(built) -> None:
    checked = 0
    for name, objects in built.items():
        cores = [each for each in objects if not each["apiVersion"].startswith("ray.io/")]
        pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": kind, **pod["metadata"]}, "spec": pod["spec"]}
                for kind, pod in pods_of(objects).items()]
        for each in [*cores, *pods]:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
            checked += 1
        assert {each["apiVersion"] for each in objects} == {"v1", "ray.io/v1"}, name
    assert checked == 2 * 6 + 3 * 3 + 2 * 3 + (1 + 3) * 2
    pods[0]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pods[0], KUBERNETES, strict=True)


HEAD = ("rayClusterSpec", "headGroupSpec", "template", "spec")
WORKERS = ("rayClusterSpec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(("way", "value", "problem"), [
    (("rayClusterSpec", "enableInTreeAutoscaling"), True, "the autoscaler is on"),
    (("rayClusterSpec", "authOptions"), {"mode": "disabled"}, "no token authentication"),
    (("rayClusterSpec", "rayVersion"), "2.9.0", "Ray's version"),
    (("rayClusterSpec", "headgroupSpec"), {}, "no such field of a cluster"),
    (("rayClusterSpec", "headGroupSpec", "serviceType"), "LoadBalancer", "open to the world"),
    ((*WORKERS, "maxReplicas"), 9, "no fixed size"),
    ((*WORKERS, "template", "spec", "volumes", 0, "emptyDir"), {}, "worker: /dev/shm has no size"),
    ((*WORKERS, "template", "spec", "containers", 0, "image"), "other:1", "differ in their image"),
    ((*HEAD, "securityContext", "runAsUser"), 0, "head: runs as root"),
    ((*HEAD, "containers", 0, "livenessProbe"), {}, "head: no livenessProbe"),
    ((*HEAD, "containers", 0, "securityContext"), {}, "head: may gain rights"),
    ((*HEAD, "automountServiceAccountToken"), True, "head: has a token"),
    (("submitterPodTemplate", "spec", "containers", 0, "resources"), {}, "submitter: no requests"),
    (("backoffLimit",), None, "no end"), (("ttlSecondsAfterFinished",), 0, "no end"),
    (("entrypoint",), "watchtower run x run_dir=/runs/x train.workers=7", "train.workers"),
    (("entrypoint",), "watchtower run x run_dir=runs/x train.workers=64", "on no shared volume"),
    ((*HEAD, "volumes", 2, "emptyDir"), {}, "head: /runs is not the shared volume"),
    (("own disks", "entrypoint"), "watchtower run x run_dir=/runs/x train.workers=64", "goes with its pod"),
    (("own disks", "entrypoint"), "watchtower run x run_dir=s3://b/x storage.work_dir=/runs/x data.logs=/runs/logs "
     "train.workers=64", "logs are on one pod's disk"),
    (("own disks", *HEAD, "volumes", 2, "emptyDir"), {}, "head: /runs is no disk of its own")])
def test_a_broken_promise_is_found(built, ray_version: str, way: tuple, value: Any, problem: str) -> None:
    objects = copy.deepcopy(built["gpu-8/job-s3" if way[0] == "own disks" else "gpu-8/job"])
    way = tuple(part for part in way if part != "own disks")
    target = of_kind(objects, "RayJob")[0]["spec"]
    for part in way[:-1]:
        target = target[part]
    target[way[-1]] = value
    assert any(problem in line for line in problems(objects, ray_version)), problems(objects, ray_version)


# --- compose ----------------------------------------------------------------------------------------------------------

def test_compose_keeps_the_promises(repository: Path) -> None:
    compose = yaml.safe_load((repository / "docker/compose.yaml").read_text())
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    for service in (head, worker):
        assert service["user"] == str(USER) and service["cap_drop"] == ["ALL"] and service["shm_size"]
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and service["secrets"] == ["ray-token"]
        assert service["entrypoint"][:4] == ["tini", "--", "ray", "start"] and "--block" in service["entrypoint"]
    assert worker["deploy"]["replicas"] == 2 and worker["depends_on"]["head"]["condition"] == "service_healthy"
    assert all(port.startswith("127.0.0.1:") for port in head["ports"]) and head["healthcheck"]["test"][0] == "CMD"
    assert compose["secrets"]["ray-token"] == {"environment": "RAY_AUTH_TOKEN"}, "the token is in no file of ours"


def test_yaml_is_clean(repository: Path) -> None:
    from yamllint import config, linter

    rules = config.YamlLintConfig((repository / ".yamllint").read_text())
    for path in sorted((repository / "docker").rglob("*.yaml")):
        assert list(linter.run(path.read_text(), rules)) == [], path
