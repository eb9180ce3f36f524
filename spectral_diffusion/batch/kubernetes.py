"""The manifest of a batch as an Indexed Job of Kubernetes, whose pods each do a share of the jobs."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from ..core.errors import UserError
from .job import Batch, BatchFolder

RETRIES = 6  # of a share, after preemption or the loss of a node
GRACE = 120  # seconds in which a training saves its state before its pod is ended
QUEUE = "kueue.x-k8s.io/queue-name"  # the label by which Kueue admits a job
USER = 1000  # of the container image


def manifest(
    folder: BatchFolder,
    batch: Batch,
    image: str,
    claim: str,
    pods: int | None = None,
    queue: str | None = None,
    mount: str | None = None,
) -> dict[str, Any]:
    """The Job as Kubernetes reads it.

    Args:
        image: the container image with this program.
        claim: a PersistentVolumeClaim with photos, adapters and cache, which every pod can write.
        pods: how many shares; default: one per job.
        queue: of Kueue, which then starts it when there is room.
        mount: where the claim is mounted; default: the folder that the batch was written in, so that its paths fit.

    Raises:
        UserError: the batch belongs to another executor, or its folder is outside the mounted one.
    """
    if batch.executor != "manual":
        raise UserError(
            f"The batch of {folder.output} is {batch.executor}'s; write it with --executor manual for Kubernetes."
        )
    shares = min(pods or len(batch.jobs), len(batch.jobs))
    place, output = mount or batch.started_in, str(folder.output.resolve())
    for path in (batch.started_in, output):
        if not PurePosixPath(path).is_relative_to(place):
            raise UserError(f"{path} is outside {place}, where the pods mount the claim; name a folder above it.")
    cluster = batch.cluster
    requests = {"memory": f"{math.ceil(cluster.memory_gb or 4)}Gi", "cpu": str(cluster.cpus or 1)}
    limits = {"memory": requests["memory"], **({"nvidia.com/gpu": str(cluster.gpus)} if cluster.gpus else {})}
    container = {
        "name": "spectral-diffusion",
        "image": image,
        "command": ["spectral-diffusion", "batch", "run", output, "--shard", f"$(JOB_COMPLETION_INDEX)/{shares}"],
        "workingDir": batch.started_in,
        "env": [{"name": "SPECTRAL_DIFFUSION_CACHE", "value": f"{place}/.spectral-cache"}],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "work", "mountPath": place}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": claim}}],
    }
    labels = {QUEUE: queue} if queue else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": resource_name(folder.output.resolve().name), "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": shares,
            "parallelism": min(cluster.parallelism or shares, shares),
            "backoffLimitPerIndex": RETRIES,
            **({"suspend": True} if queue else {}),
            "template": {"spec": pod},
        },
    }


def resource_name(text: str) -> str:
    """A folder's name as one of Kubernetes: small letters, digits and hyphens, at most 63."""
    return ("spectral-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"))[:63].rstrip("-")


def as_yaml(value: dict[str, Any]) -> str:
    """A manifest as the text that ``kubectl apply -f`` reads."""
    return str(yaml.safe_dump(value, sort_keys=False))
