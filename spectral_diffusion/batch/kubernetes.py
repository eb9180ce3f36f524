"""The manifest of a batch as an Indexed Job of Kubernetes, whose pods each do a share of the jobs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from ..core.errors import Fix, UserError
from .job import Batch, BatchFolder

RETRIES = 6  # of a share, after the loss of a node and the like
GRACE = 120  # seconds in which a training saves its state before its pod is ended
QUEUE = "kueue.x-k8s.io/queue-name"  # the label by which Kueue admits a job
USER = 1000  # of the container image
NAME = "spectral-diffusion"  # of the container
LONGEST = 50  # of a job's name: those of its pods are longer, and at most 63
FAILURES = [  # preemption uses up no retry, and an error that a retry would meet again is not retried
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailIndex", "onExitCodes": {"containerName": NAME, "operator": "In", "values": [2]}},
]


@dataclass(frozen=True)
class Pods:
    """What the pods of a batch are.

    Attributes:
        image: the container image with this program.
        claim: a PersistentVolumeClaim with photos, adapters and cache, which every pod can write.
        count: how many shares; default: one per job.
        queue: of Kueue, which then starts them when there is room.
        mount: where the claim is mounted; default: the folder that the batch was written in, so that its paths fit.
    """

    image: str
    claim: str
    count: int | None = None
    queue: str | None = None
    mount: str | None = None


def manifest(folder: BatchFolder, batch: Batch, pods: Pods) -> dict[str, Any]:
    """The Job as Kubernetes reads it.

    Raises:
        UserError: the batch belongs to another executor, or its folder is outside the mounted one.
    """
    mount, output = pods.mount or batch.started_in, str(folder.output.resolve())
    check_shareable(folder, batch)
    for path in (batch.started_in, output):
        if not PurePosixPath(path).is_relative_to(mount):
            raise UserError(f"{path} is outside {mount}, where the pods mount the claim; name a folder above it.")
    shares = min(pods.count or len(batch.jobs), len(batch.jobs))
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container(batch, output, pods, mount, shares)],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": pods.claim}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": resource_name(folder.output.resolve().name),
            "labels": {QUEUE: pods.queue} if pods.queue else {},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": shares,
            "parallelism": min(batch.cluster.parallelism or shares, shares),
            "backoffLimitPerIndex": RETRIES,
            "podFailurePolicy": {"rules": FAILURES},
            **({"suspend": True} if pods.queue else {}),
            "template": {"spec": pod},
        },
    }


def check_shareable(folder: BatchFolder, batch: Batch) -> None:
    """Refuse a batch whose jobs cannot be done in any order by pods.

    Raises:
        UserError: it is one.
    """
    if batch.executor != "manual":
        raise UserError(
            f"The batch of {folder.output} is {batch.executor}'s, and Kubernetes takes one that nobody works on yet.",
            Fix("executor", "manual"),
        )
    if batch.finish or not batch.jobs:
        raise UserError(
            f"The last job of {folder.output} needs all the others, which pods do in any order. Several machines can "
            f"do a share each (spectral-diffusion batch run {folder.output}), and one of them the last job."
        )


def container(batch: Batch, output: str, pods: Pods, mount: str, shares: int) -> dict[str, Any]:
    """The container of a pod."""
    cluster = batch.cluster
    requests = {"memory": f"{math.ceil(cluster.memory_gb or 4)}Gi", "cpu": str(cluster.cpus or 1)}
    limits = {"memory": requests["memory"], **({"nvidia.com/gpu": str(cluster.gpus)} if cluster.gpus else {})}
    return {
        "name": NAME,
        "image": pods.image,
        "command": ["spectral-diffusion", "batch", "run", output, "--shard", f"$(JOB_COMPLETION_INDEX)/{shares}"],
        "workingDir": batch.started_in,
        "env": [{"name": "SPECTRAL_DIFFUSION_CACHE", "value": f"{mount}/.spectral-cache"}],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "work", "mountPath": mount}],
    }


def resource_name(text: str) -> str:
    """A folder's name as one of Kubernetes: small letters, digits and hyphens, not too long."""
    return ("spectral-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"))[:LONGEST].rstrip("-")


def as_yaml(value: dict[str, Any]) -> str:
    """A manifest as the text that ``kubectl apply -f`` reads."""
    return str(yaml.safe_dump(value, sort_keys=False))
