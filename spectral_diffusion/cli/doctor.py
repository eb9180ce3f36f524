"""The verb that looks at this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .support import plain, say


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs and bug reports.")] = False) -> None:
    """Show versions, devices, quick precisions, memory, caches, and the settings that suit this machine."""
    from ..doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    seconds = found.precision["cpu_seconds"]
    rows: dict[str, Any] = {
        "Processor": f"{found.system['cpu']} ({found.system['capability']}), {found.system['cores']} cores, "
        f"{found.system['threads']} threads in use",
        "System": found.system["platform"],
        "Free memory": f"{found.system.get('memory_free_gib', 'unknown')} GiB",
        "GPU": "; ".join(f"{one['name']} ({one['device']}, {one.get('memory_gib', '?')} GiB)" for one in found.devices)
        or "none",
        "bfloat16 on the CPU": f"{seconds['bf16'] / seconds['float32']:.1f} times float32's time",
        "A training step": f"{found.speed['pocket_step_seconds']:.2f} s on the pocket base (preset pocket, "
        f"{found.speed['device']})",
        "Quickest settings": plain(found.settings),
        "Caches": f"{found.caches['folder']}: {plain(found.caches['mib']) or 'empty'} (MiB)",
        "Versions": plain(found.versions),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")
    for one in found.missing:
        say(f"{'Not installed':<{width}}  {one['package']}, for {one['for']}: {one['install']}")
    for text in found.problems:
        say(f"{'Problem':<{width}}  {text}")
