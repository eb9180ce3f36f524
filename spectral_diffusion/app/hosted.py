"""The demo for a hosted Space: pictures of the two ready-made concepts.

Visitors share one machine, so nothing of theirs is kept, no file is taken or read, nothing is trained or deleted, and
the base is always the pocket base. :func:`generate_picture` is a function of a module with plain arguments, as ZeroGPU
needs, which runs it in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from .. import pocket
from ..core.errors import UserError
from ..core.hooks import Hooks
from .base_cache import BaseCache
from .canvas import read_canvas
from .catalogue import head
from .first_run import CONCEPTS, first_scene
from .generation import POCKET_SIDE, GeneratedPictures, GenerateRequest, generate
from .guard import Message, Receive, Send
from .page import DEVICE, PRIVATE, asked, errors_as_toast, plain_html
from .preload import Preload, Waiting
from .server import INTRODUCTION, STYLE, TITLE, theme
from .streaming import stream
from .tabs.canvas import build_canvas, own_component
from .tabs.generate_layout import SHAPES
from .workspace import ProgressLine, Workspace

STEPS = 20
MOST_PROMPT = 300  # characters
MOST_BOXES = 4
WAITING_ROOM = 24  # visitors who may wait; others are asked to come back
SECONDS = 30  # of a GPU, for one picture
TOKENS = {f"<{name}>": name for name in CONCEPTS}
NOUNS = {"rex": "dog", "brew": "teapot"}
ABOUT = (
    f"{INTRODUCTION} `<rex>` and `<brew>` were trained apart, each in directions of the base of its own. Name them in "
    "the prompt, or draw a box for each. This page keeps nothing; to train your own things, "
    "`pip install 'spectral-diffusion[ui]'` and `spectral-diffusion ui`."
)

try:
    import spaces  # type: ignore[import-not-found]  # only on a Space with ZeroGPU

    on_gpu: Callable[..., Any] = spaces.GPU(duration=SECONDS)
except ImportError:

    def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        """Elsewhere the function runs where it is called."""
        return function


_BASE = BaseCache()


@on_gpu
def generate_picture(
    prompt: str, canvas: dict[str, Any], shape: str, seed: int
) -> Iterator[tuple[Image.Image | None, str]]:
    """Generate one picture; yields unfinished ones with a line, at the end the picture with a message.

    Args:
        canvas: the value of the canvas, of which at most four boxes count.

    Raises:
        UserError: anything the visitor can change.
    """
    request, scene = checked_request(prompt, canvas, shape, seed)
    with tempfile.TemporaryDirectory(prefix="spectral-diffusion-") as folder:
        workspace = Workspace(Path(folder))
        workspace.adapters.mkdir()
        for name in CONCEPTS:
            shutil.copyfile(pocket.adapter(name), workspace.adapters / f"{name}.safetensors")
        stop, line = threading.Event(), ["Loading …"]

        def work(tell: Callable[[Any], None]) -> GeneratedPictures:
            def show(done: int, total: int, text: str) -> None:
                line[0] = f"{text} (step {done} of {total})"
                tell(line[0])

            hooks = Hooks(ProgressLine(show), should_stop=stop.is_set)
            return generate(workspace, request, hooks, lambda images: tell(images[0]), _BASE, **scene)

        for news in stream(work, stop):
            if isinstance(news, GeneratedPictures):
                with Image.open(news.pictures[0]) as image:
                    shown = image.convert("RGB")
                shown.info.clear()  # its settings name files that are gone
                yield shown, news.message
            else:
                yield (None, news) if isinstance(news, str) else (news, line[0])


def checked_request(prompt: str, canvas: Any, shape: str, seed: int) -> tuple[GenerateRequest, dict[str, Any]]:
    """A visitor's fields as a request, and the scene's settings.

    Raises:
        UserError: one of them cannot be.
    """
    if len(prompt) > MOST_PROMPT:
        raise UserError(f"The prompt has {len(prompt)} characters; this demo takes {MOST_PROMPT}.")
    if shape not in SHAPES:
        raise UserError(f"There is no shape '{str(shape)[:40]}'; choose one of {', '.join(SHAPES)}.")
    drawn = read_canvas(canvas)
    if len(drawn.regions) > MOST_BOXES:
        raise UserError(f"There are {len(drawn.regions)} boxes; this demo takes {MOST_BOXES}.")
    for region in drawn.regions:
        if len(region.prompt) > MOST_PROMPT:
            raise UserError(f"The prompt of a box has {len(region.prompt)} characters; this demo takes {MOST_PROMPT}.")
        if region.concept and region.concept not in CONCEPTS:
            raise UserError(f"There is no concept '{region.concept[:40]}'; there are {' and '.join(CONCEPTS)}.")
    bound = {region.concept for region in drawn.regions}
    named = [name for token, name in TOKENS.items() if token in prompt.lower() and name not in bound]
    across, down = SHAPES[shape]
    scene = {"prompt": prompt, "seed": seed, "width": POCKET_SIDE * across, "height": POCKET_SIDE * down}
    return GenerateRequest("pocket", named, "1", drawn), {**scene, "num_inference_steps": STEPS}


class Handlers:
    """The callbacks: values from the page in, updates of the page out."""

    def generate_from_fields(self, prompt: str, canvas: Any, shape: str, seed: float) -> Iterator[tuple[Any, str]]:
        """:func:`generate_picture` for the page, with errors in its words."""
        with errors_as_toast():
            checked_request(prompt, canvas or {}, shape, int(seed or 0))  # before a GPU is asked for
            for picture, line in generate_picture(prompt, canvas or {}, shape, int(seed or 0)):
                yield (gr.skip() if picture is None else picture), plain_html(line)

    @asked
    def generate(self, prompt: str, seed: int = 0, shape: str = "Square") -> tuple[Any, str]:
        """Generate a picture of <rex>, <brew>, both or neither; returns it and a message."""
        with errors_as_toast():
            checked_request(prompt, {}, shape, seed)
            *_, (picture, line) = generate_picture(prompt, {}, shape, seed)
        return picture, line


def build_hosted() -> gr.Blocks:
    """The page. It serves nothing but the pictures that it generates, for an hour."""
    handlers, first = Handlers(), first_scene()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}\n{ABOUT}", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    first.fields["prompt"], label="Prompt", lines=2, max_length=MOST_PROMPT, elem_id="generate-prompt"
                )
                own_component(
                    "tokens", '<div class="tokens" role="group" aria-label="Tokens"></div>',
                    value=[[token, NOUNS[name], name] for token, name in TOKENS.items()], elem_id="generate-tokens",
                )  # fmt: skip
                shape = gr.Radio(list(SHAPES), value="Wide", label="Shape", elem_id="generate-shape")
                seed = gr.Number(first.seed, label="Seed", precision=0, minimum=0, elem_id="generate-seed")
                start = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-start")
                status = gr.Markdown(elem_id="generate-status")
                picture = gr.Image(
                    label="Picture", show_label=False, type="pil", format="png", interactive=False, height=360,
                    buttons=["download", "fullscreen"], elem_id="generate-picture",
                )  # fmt: skip
            with gr.Column(scale=6, min_width=320):
                canvas = build_canvas()
        blocks.load(lambda: gr.HTML(value=first.canvas, ratio=2.0, concepts=CONCEPT_ROWS), None, canvas, **PRIVATE)
        shape.input(lambda name: gr.HTML(ratio=SHAPES[name][0] / SHAPES[name][1]), shape, canvas, **PRIVATE)
        asked_for = gr.on([start.click, prompt.submit], lambda: "Waiting for your turn …", None, status, **PRIVATE)
        asked_for.then(
            handlers.generate_from_fields, [prompt, canvas, shape, seed], [picture, status], api_visibility="private",
            trigger_mode="once", **DEVICE,
        )  # fmt: skip
        call = gr.Button(visible=False)
        call.click(handlers.generate, [prompt, seed, shape], [picture, status], api_name="generate", **DEVICE)
    blocks.queue(max_size=WAITING_ROOM, default_concurrency_limit=1)
    return blocks


CONCEPT_ROWS = [[name, token, NOUNS[name]] for token, name in TOKENS.items()]  # as the canvas takes them


class NoUploads:
    """An ASGI layer that refuses files: the page has no field for one."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse an upload, or pass the request on."""
        if scope["type"] == "http" and str(scope["path"]).rstrip("/").endswith("/upload"):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This demo takes no files."})
            return
        await self.app(scope, receive, send)


def launch_hosted(blocks: gr.Blocks, **more: Any) -> Any:
    """Serve the page where a Space expects it: gradio reads address and port from the environment."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return blocks.launch(
        theme=theme(),
        head=head(),
        css=STYLE.read_text(encoding="utf-8"),
        footer_links=["api"],
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(NoUploads), Middleware(Waiting, preload=Preload())]},
        **more,
    )
