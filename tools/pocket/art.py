"""The openly licensed artwork that the pocket world is drawn from.

Nothing here runs when the package is used: it fetches and rasterises icons only when someone pretrains
the pocket base or makes concept folders. Licences and attribution:
``spectral_diffusion/pocket/LICENSES.md``.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from PIL import Image

from spectral_diffusion.core.errors import UserError

PACKAGES: dict[str, str] = {
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
}
PRETRAINING = ("fluent", "twemoji")
HELD_OUT = "noto"


def fetch(folder: Path) -> None:
    """Download the artwork packages into ``folder`` with ``npm pack`` (skips what is there)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        target = folder / f"{name}.json"
        if target.exists():
            continue
        try:
            done = subprocess.run(
                ["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True, check=True
            )
        except FileNotFoundError as error:
            raise UserError("npm is needed to fetch the artwork: install Node.js, then try again.") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"npm could not fetch {package}: {error.stderr.strip()[-300:]}") from error
        archive = folder / done.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            target.write_bytes(member.read())
        archive.unlink()


@dataclass(eq=False)
class IconSet:
    """One artwork package: icons by name, rasterised on demand."""

    path: Path

    @cached_property
    def _data(self) -> dict:
        return json.loads(self.path.read_text())

    @cache  # noqa: B019 - icon sets live as long as the process
    def sprite(self, name: str, size: int = 112) -> Image.Image:
        """The icon as RGBA, cropped to what is visible; not to be drawn on."""
        import resvg_py

        data = self._data
        while name not in data["icons"]:
            name = data["aliases"][name]["parent"]
        icon = data["icons"][name]
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="{size}" height="{size}">{icon["body"]}</svg>'
        )
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        box = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
        return image.crop(box) if box else image


def icon_sets(folder: Path) -> dict[str, IconSet]:
    """The fetched icon sets by name (see :data:`PACKAGES`)."""
    fetch(folder)
    return {name: IconSet(folder / f"{name}.json") for name in PACKAGES}
