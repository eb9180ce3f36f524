"""The verb that examines this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .support import as_text, echo


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs and bug reports.")] = False) -> None:
    """Show versions, devices, quick precisions, memory, caches, and the settings that suit this machine."""
    from ..doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
        return
    seconds = report.precision["cpu_seconds"]
    rows: dict[str, Any] = {
        "Processor": f"{report.system['cpu']} ({report.system['capability']}), {report.system['cores']} cores, "
        f"{report.system['threads']} threads in use",
        "System": report.system["platform"],
        "Free memory": f"{report.system.get('memory_free_gib', 'unknown')} GiB",
        "GPU": "; ".join(
            f"{device['name']} ({device['device']}, {device.get('memory_gib', '?')} GiB)" for device in report.devices
        )
        or "none",
        "bfloat16 on the CPU": f"{seconds['bf16'] / seconds['float32']:.1f} times float32's time",
        "A training step": f"{report.speed['pocket_step_seconds']:.2f} s on the pocket base (preset pocket, "
        f"{report.speed['device']})",
        "Quickest settings": as_text(report.settings),
        "Caches": f"{report.caches['folder']}: {as_text(report.caches['mib']) or 'empty'} (MiB)",
        "Versions": as_text(report.versions),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        echo(f"{name:<{width}}  {value}")
    for package in report.missing:
        echo(f"{'Not installed':<{width}}  {package['package']}, for {package['for']}: {package['install']}")
    for text in report.problems:
        echo(f"{'Problem':<{width}}  {text}")
