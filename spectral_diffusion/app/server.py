"""The app: four tabs over one workspace. The modules beside it do the work, without gradio."""

from __future__ import annotations

from collections.abc import Callable
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..core.errors import Fix, UserError
from . import catalogue, temporary
from .guard import Guard
from .page import Page
from .preload import Preload, Waiting
from .tabs import concepts, fuse, generate, train
from .workspace import Workspace

# This machine's own names; any other name that resolves to it belongs to another site.
LOCAL = ["localhost", "127.0.0.1", "::1", "[::1]"]
STYLE = Path(__file__).with_name("style.css")
TITLE = "Spectral Diffusion"
INTRODUCTION = "Several of your own things together in one picture, each still itself."
TABS = {
    "concepts": ("1 · Concepts", concepts),
    "train": ("2 · Train", train),
    "fuse": ("3 · Fuse", fuse),
    "generate": ("4 · Generate", generate),
}


class App(gr.Blocks):
    """The page, the folder of pictures that it may serve, and the callbacks of disconnected clients.

    Attributes:
        gone: called with the session of a browser or program that has disconnected.
        ready: called once the server is up and everything is imported.
    """

    pictures: Path
    gone: list[Callable[[str], None]]
    ready: list[Callable[[], None]]

    def own_hosts(self) -> list[str]:
        """The app's public host names: that of its share link."""
        return [urlsplit(self.share_url).netloc] if self.share_url else []

    def left(self, session: str) -> None:
        """Stop the work of a disconnected client."""
        for stop in self.gone:
            stop(session)


def build_app(workspace: Path) -> App:
    """The app over one workspace folder, which is made on the first write."""
    root = Workspace(Path(workspace).absolute())
    temporary.choose_folder(root.root)
    with App(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        blocks.pictures, blocks.gone, blocks.ready = root.pictures, [], []
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION}", elem_id="title")
        # Outside the tabs: gradio counts their children.
        handed = gr.State(None), gr.State(None), gr.State(None), gr.State(None)
        strip = gr.HTML(
            visible=False, elem_id="train-strip", label="Training now",
            js_on_load="element.onclick = (event) => event.target.closest('button') && trigger('click')",
        )  # fmt: skip
        timer = gr.Timer(1.0, active=False)
        trained = gr.State({})
        with gr.Tabs(elem_id="steps") as tabs:
            page = Page(root, blocks, tabs, strip, timer, trained, *handed, gone=blocks.gone, ready=blocks.ready)
            for name, (title, module) in TABS.items():
                with gr.Tab(title, id=name, elem_id=f"tab-{name}") as tab:
                    module.build(page, tab)
    return blocks


def theme() -> gr.themes.Base:
    """The page's colors: gradio's soft theme, with every text at a contrast of 4.5 to 1 or more."""
    quiet = {"": "*neutral_600", "_dark": "*neutral_300"}
    marked = {"": "*primary_700", "_dark": "white"}
    colors = {
        **{f"body_text_color_subdued{mode}": color for mode, color in quiet.items()},
        **{f"block_info_text_color{mode}": color for mode, color in quiet.items()},
        **{f"input_placeholder_color{mode}": color for mode, color in quiet.items()},
        **{f"block_title_text_color{mode}": color for mode, color in marked.items()},
        **{f"block_label_text_color{mode}": color for mode, color in marked.items()},
        **{f"button_primary_background_fill{mode}": "*primary_600" for mode in quiet},
        **{f"button_primary_background_fill_hover{mode}": "*primary_700" for mode in quiet},
        **{f"checkbox_label_background_fill_selected{mode}": "*primary_600" for mode in quiet},
        **{f"checkbox_background_color_selected{mode}": "*primary_700" for mode in quiet},
        "color_accent": "*primary_600",
    }
    soft = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return soft.set(**colors)


def launch(
    blocks: App, port: int, host: str = "127.0.0.1", share: bool = False, password: str | None = None, **more: Any
) -> Any:
    """Serve the app; only the workspace's pictures are served as files.

    Raises:
        UserError: the port is taken, or the app would be open to others without a password.
    """
    if (share or not is_local(host)) and not password:
        raise UserError("Others could open the app without a password.", Fix("password", so="to set one"))
    guards = [
        Middleware(Guard, own=blocks.own_hosts, left=blocks.left),
        Middleware(Waiting, preload=Preload(blocks.ready)),
    ]
    if not password:
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL))
    temporary.prepare_folder()
    gr.set_static_paths([blocks.pictures.absolute()])  # else gradio copies every picture that it shows
    try:
        return blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=(lambda _, given: compare_digest(given.encode(), password.encode())) if password else None,
            auth_message="Any name will do; the password is the one that the app was started with.",
            allowed_paths=[str(blocks.pictures.absolute())],
            theme=theme(),
            head=catalogue.head(),
            css=STYLE.read_text(encoding="utf-8"),
            footer_links=["api"],
            max_file_size="50mb",
            app_kwargs={"middleware": guards},
            **more,
        )
    except OSError as error:
        raise UserError(f"Cannot serve on port {port} of {host}, perhaps it is taken; choose another port.") from error


def is_local(host: str) -> bool:
    """Whether only this machine can reach this address."""
    return host in LOCAL
