"""The callbacks of the generate tab: values from the page in, updates of the page out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ...config.train import is_style_noun
from ...core.errors import UserError
from ...core.hooks import Hooks
from .. import gallery as pictures
from .. import generation
from ..adapters import adapter_rows, read_adapter
from ..arranging import prompt_naming, side_by_side
from ..base_cache import BaseCache
from ..bases import base_choices, base_path
from ..canvas import Canvas, ink_of_drawing, read_canvas, read_regions
from ..first_run import first_scene
from ..generation import GeneratedPictures, GenerateRequest
from ..page import Handed, asked, errors_as_toast, plain_html
from ..presets import suited_bases
from ..streaming import CancelTokens, stream
from ..workspace import ProgressLine, Workspace
from .generate_layout import SHAPES, Fields
from .pairs import NOT_BEGUN, WAITING, PairHandlers

NO_CONCEPTS = (
    "You have no trained concepts yet, so use the base's own words, such as *a red dog on the beach*. "
    "To have your own things in pictures, train one in step 2."
)
FIRST = "Both concepts were trained apart, and each acts in its own box. Drag the boxes"
ADVICE = {  # whether it is one picture
    True: " Another seed gives another picture, and four at once show which is best.",
    False: " The first is shown, the others are in the row below. Other seeds and longer training may do better.",
}
INVITATION = (
    "This is `<rex>` and `<brew>`: two adapters that were trained apart, each in the box that you see on the canvas. "
    "Drag the boxes, change the prompts, and generate again. **Next:** add a thing of your own in step 1 and train it."
)


@dataclass
class GenerateHandlers:
    """The buttons' callbacks: arguments from the page in, updates of the page out."""

    workspace: Workspace
    keeper: BaseCache = field(default_factory=BaseCache)
    runs: CancelTokens = field(default_factory=CancelTokens)
    suited_bases: list[str] = field(default_factory=list)  # of this computer, once the tab was opened

    def computer(self) -> Any:
        """The bases, with those that this computer has room for."""
        with errors_as_toast():
            self.suited_bases = list(suited_bases())
        return gr.Dropdown(choices=base_choices(self.workspace, self.suited_bases))

    def lists(self, base: str | None, chosen: list[str] | None) -> list[Any]:
        """The bases, a note, and the updates of :meth:`follow`."""
        with errors_as_toast():
            rows, problems = adapter_rows(self.workspace)
            lines = [*([] if rows else [NO_CONCEPTS]), *map(plain_html, problems)]
            return [
                gr.Dropdown(choices=base_choices(self.workspace, self.suited_bases)),
                gr.Markdown("\n\n".join(lines), visible=bool(lines)),
                *self.follow(base, chosen),
            ]

    def follow(self, base: str | None, chosen: list[str] | None) -> list[Any]:
        """The choices of a base: concepts and their strength, the canvas's concepts, the tokens.

        A fused base contains its concepts and accepts adapters trained on it; others accept those that may fit.
        """
        try:
            inside = generation.tokens(self.workspace, base, [])
        except UserError:  # reported on generating
            inside = {}
        every = adapter_rows(self.workspace)[0]
        distinct = {base_path(self.workspace, choice) for choice in base_choices(self.workspace, self.suited_bases)}
        fits = generation.is_base if inside else partial(generation.may_fit, distinct=distinct)
        rows = [row[:3] for row in every if fits(self.workspace, base, row[-1])]
        names = [row[0] for row in rows]
        available = [
            name for name in chosen or [] if name in names
        ]  # unchanged otherwise: it may have just been handed over
        tokens = [*([token, noun, ""] for token, noun in inside.items()), *([row[1], row[2], row[0]] for row in rows)]
        return [
            gr.Dropdown(
                choices=names, visible=bool(rows), **({"value": available} if available != (chosen or []) else {})
            ),
            gr.Textbox(visible=bool(rows)),
            gr.HTML(concepts=[row for row in rows if not is_style_noun(row[2])]),  # a style has no box
            tokens,
        ]

    def pick(self, chosen: list[str] | None, event: gr.EventData) -> list[str]:
        """The concepts plus those whose tokens were put into the prompt."""
        names = [str(name) for name in (event._data or {}).get("names") or [] if name]
        return list(dict.fromkeys([*(chosen or []), *names]))

    def shape(self, shape: str | None, base: str | None) -> tuple[int, int]:
        """Width and height of a shape at the base's native size."""
        side = generation.side_of(self.workspace, base)
        across, down = SHAPES.get(shape or "", (1, 1))
        return side * across, side * down

    def handed_base(self, handed: Handed, shape: str | None, *sampling: float) -> tuple[Any, ...]:
        """A base that was handed over, no concepts, and the values of :meth:`suited`."""
        return handed[0], [], *self.suited(handed[0], shape, *sampling)

    def handed_adapters(self, handed: Handed, shape: str | None, *sampling: float) -> tuple[Any, ...]:
        """The base of the adapters that were handed over, these, and the values of :meth:`suited`."""
        with errors_as_toast():
            base = generation.chosen_base(self.workspace, handed[0][0])
        return base, handed[0], *self.suited(base, shape, *sampling)

    def prompt_of_handed(self, prompt: str, canvas: Any, handed: Handed) -> tuple[str, Any]:
        """A prompt that names the adapters that were handed over, and the canvas without the boxes of others."""
        with errors_as_toast():
            adapters = [read_adapter(self.workspace, name) for name in handed[0]]
        others = [row[1] for row in adapter_rows(self.workspace)[0]]
        kept = canvas if isinstance(canvas, dict) else {}
        boxes = kept.get("regions") or []
        mine = [box for box in boxes if box.get("concept") in handed[0]]
        if len(mine) < len(boxes):
            gr.Info("The boxes of others are gone; Undo on the canvas brings them back.")
        changed = {**kept, "regions": mine} if len(mine) < len(boxes) else gr.skip()
        return prompt_naming(adapters, others, prompt), changed

    def arranged(self, chosen: list[str] | None, prompt: str, canvas: Any, base: str | None) -> list[Any]:
        """A box for each chosen thing, side by side: the prompt, the canvas, the concepts left, the size and shape."""
        with errors_as_toast():
            every = {name: read_adapter(self.workspace, name) for name in chosen or []}
            things = {name: adapter for name, adapter in every.items() if not adapter.is_style}
            prompt, boxes = side_by_side(things, prompt)
        kept = canvas if isinstance(canvas, dict) else {}
        styles = [name for name in every if name not in things]
        return [
            prompt,
            {"strokes": "", "keypose": "", **kept, "regions": boxes},
            styles,
            *self.shape("Wide", base),
            "Wide",
        ]

    def suited(self, base: str | None, shape: str | None, *sampling: float) -> tuple[Any, ...]:
        """Width and height that suit a base, and the values of :func:`.generation.sampling_of`."""
        return *self.shape(shape, base), *generation.sampling_of(self.workspace, base, sampling)

    def reshaped(self, base: str | None, width: float | None, height: float | None) -> tuple[Any, str | None]:
        """The canvas in the picture's shape, and the shape's name if it has one."""
        ratio = generation.ratio_of(self.workspace, base, width, height)
        names = {across / down: name for name, (across, down) in SHAPES.items()}
        return gr.HTML(ratio=ratio), names.get(ratio)

    def estimate(self, *values: Any) -> str:
        """How long the pictures of the fields will take."""
        fields = Fields.named(values)
        regions = (fields.pop("canvas") or {}).get("regions") or []
        return generation.estimate(self.workspace, fields.pop("base"), len(regions), **fields)

    def begin(self, request: gr.Request) -> list[Any]:
        """Register a run and show Cancel instead of Generate; the last value is the run's ticket."""
        ticket = self.runs.begin(request.session_hash or "")
        return [gr.Button(visible=False), gr.Button(visible=True), WAITING, gr.Row(visible=True), ticket]

    def begin_both(self, request: gr.Request) -> list[Any]:
        """:meth:`begin` of a comparison, which shows its pictures elsewhere."""
        start, cancel, status, _, ticket = self.begin(request)
        return [start, cancel, status, ticket]

    def ended(self, ticket: str, request: gr.Request) -> list[Any]:
        """Show Generate again, unless another run of this browser waits. The run may have failed before it began."""
        self.runs.end(ticket)
        busy = self.runs.busy(request.session_hash or "")
        return [gr.Button(visible=not busy), gr.Button(visible=busy)]

    def cancel(self, request: gr.Request) -> list[Any]:
        """Stop this browser's run. One at work shows its own last message; one that waits ends here."""
        if self.runs.stop(request.session_hash or ""):
            return [gr.skip()] * 3
        return [gr.Button(visible=True), gr.Button(visible=False), NOT_BEGUN]

    def cancel_for_program(self, request: gr.Request) -> str:
        """Stop the pictures that this client has asked for; returns a message."""
        return "Stopping." if self.runs.stop(request.session_hash or "") else "Nothing was being generated."

    def left(self, request: gr.Request) -> None:
        """The browser has disconnected: stop its run."""
        self.gone(request.session_hash or "")

    def gone(self, session: str) -> None:
        """A browser or a program has disconnected."""
        self.runs.stop(session)

    def generate_from_fields(self, ticket: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Generate; yields unfinished pictures and a line, at the end the picture, the line, and the picture's name."""
        yield from self._stream_pictures(ticket, lambda: self._request(Fields.named(values)))

    def generate_first(self, ticket: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """:meth:`generate_from_fields`, with an invitation under the picture once it is there."""
        for picture, line, name in self.generate_from_fields(ticket, *values):
            yield picture, INVITATION if isinstance(name, str) else line, name

    def again(self, ticket: str, name: str | None) -> Iterator[tuple[Any, ...]]:
        """Generate a picture of the gallery again, from its own settings."""

        def request_of_picture() -> tuple[GenerateRequest, dict[str, Any]]:
            refill = pictures.refill(self.workspace, name)
            if refill.notes:
                raise UserError(f"It cannot be generated again as it was: {refill.notes[0]}")
            generate_request = GenerateRequest(
                refill.base, refill.adapters, refill.strength, read_canvas(refill.canvas), refill.sketch_weight,
                refill.keypose_weight, refill.sketch_adapter, refill.keypose_adapter,
            )  # fmt: skip
            return generate_request, {"seed": refill.seed, **refill.fields}

        yield from self._stream_pictures(ticket, request_of_picture)

    def generate_both(self, ticket: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The fields' picture and a second one; the last three values say what is different in that."""
        *first, base, adapters, strength = values
        pairs = PairHandlers(self.workspace, self.runs, self.keeper)
        ask = partial(self._request, Fields.named(tuple(first)))
        yield from pairs.generate_both(ask, (base, adapters, strength), ticket)

    @asked
    def generate(
        self,
        prompt: str,
        base: str | None = "pocket",
        adapters: list[str] | None = None,
        strength: str | None = "1",
        negative_prompt: str | None = "",
        seed: int | None = None,
        num_images: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sketch: str | None = None,
        sketch_weight: float | None = None,
        sketch_adapter: str | None = "",
        regions: Any = None,
        global_prompt_weight: float | None = None,
        region_isolation: float | None = None,
        sampler: str | None = None,
        request: gr.Request | None = None,
    ) -> tuple[list[str], str]:
        """Draw pictures from fields alone; returns their files and a message.

        ``sketch`` is a picture file; ``regions`` a list such as
        ``[{"box": [0, 0, 0.5, 1], "prompt": "a photo of <rex>", "concept": "rex"}]``, boxes in fractions.
        """
        who = (request.session_hash if request else "") or ""
        with errors_as_toast():
            canvas = Canvas(ink_of_drawing(Path(sketch)) if sketch else None, None, read_regions(regions))
            generate_request = GenerateRequest(
                base, adapters or [], strength, canvas, 1.0 if sketch_weight is None else sketch_weight,
                sketch_adapter=sketch_adapter,
            )  # fmt: skip
            scene: dict[str, Any] = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": seed,
                "num_images": num_images,
                "width": width,
                "height": height,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "sampler": sampler,
                "global_prompt_weight": global_prompt_weight,
                "region_isolation": region_isolation,
            }
            ticket = self.runs.begin(who)
            stop = self.runs.take(ticket) or threading.Event()
            try:
                generated = generation.generate(
                    self.workspace, generate_request, Hooks(should_stop=stop.is_set), keeper=self.keeper, **scene
                )
            finally:
                self.runs.end(ticket)
        return [str(path) for path in generated.pictures], generated.message

    def refilled(self, name: str | None) -> list[Any]:
        """The fields filled from a picture of the gallery, and a message."""
        with errors_as_toast():
            return self._filled(pictures.refill(self.workspace, name), "The picture's settings are in the fields above")

    def first(self) -> list[Any]:
        """The fields of the first picture, and a message."""
        return self._filled(first_scene(), FIRST)

    def places(self, name: str | None) -> list[Any]:
        """The same with boxes where the picture's concepts were found, over the picture itself."""
        with errors_as_toast():
            refill, backdrop = pictures.boxes_of_places(self.workspace, name)
            return self._filled(refill, "The places are boxes on the canvas above; drag them", backdrop)

    def _filled(self, refill: pictures.Refill, message: str, backdrop: str = "") -> list[Any]:
        """The fields' values, and a message; ``backdrop`` is a picture behind the canvas."""
        values = {
            **refill.fields, "base": refill.base, "adapters": refill.adapters, "strength": refill.strength,
            "seed": refill.seed, "num_images": 1, "sketch_weight": refill.sketch_weight,
            "sketch_adapter": refill.sketch_adapter, "keypose_weight": refill.keypose_weight,
            "keypose_adapter": refill.keypose_adapter,
        }  # fmt: skip
        loaded = generation.as_loaded(self.workspace, refill.base)
        if loaded.get("quantization", "none") == refill.fields["quantization"]:
            values["quantization"] = ""  # how the base is loaded anyway; chosen, it would stay for the next base
        ratio = generation.ratio_of(self.workspace, refill.base, refill.fields["width"], refill.fields["height"])
        values["canvas"] = gr.HTML(value=refill.canvas, ratio=ratio, backdrop=backdrop)
        line = " ".join([f"{message}; change what you like.", *refill.notes])
        return [*(values[item.name] for item in fields(Fields)), plain_html(line)]

    def _request(self, given: dict[str, Any]) -> tuple[GenerateRequest, dict[str, Any]]:
        """The page's fields as a request, and the scene's settings."""
        mine = ("base", "adapters", "strength", "sketch_weight", "sketch_adapter", "keypose_weight", "keypose_adapter")
        own = {name: given.pop(name) for name in mine}
        own["adapters"] = own["adapters"] or []
        given |= {side: given[side] or None for side in ("width", "height")}  # the page may say 0 for an empty field
        return GenerateRequest(canvas=read_canvas(given.pop("canvas")), **own), given

    def _stream_pictures(self, ticket: str, make_request: Any) -> Iterator[tuple[Any, ...]]:
        stop = self.runs.take(ticket)
        if stop is None:  # cancelled while it waited, which the page has said
            yield (gr.skip(),) * 3
            return
        line = [WAITING]

        def work(tell: Any) -> GeneratedPictures:
            def show_step(done: int, total: int, text: str) -> None:
                line[0] = f"{text} (step {done} of {total})"
                tell(line[0])

            generate_request, scene = make_request()
            return generation.generate(
                self.workspace,
                generate_request,
                Hooks(ProgressLine(show_step), should_stop=stop.is_set),
                lambda images: tell(images[0]),
                self.keeper,
                **scene,
            )

        try:
            with errors_as_toast():
                for news in stream(work, stop):
                    if isinstance(news, GeneratedPictures):
                        first = news.pictures[0] if news.pictures else None
                        yield (
                            str(first) if first else gr.skip(),
                            plain_html(news.message) + ADVICE[len(news.pictures) == 1]
                            if first
                            else plain_html(news.message),
                            first.stem if first else gr.skip(),
                        )
                    elif isinstance(news, str):
                        yield gr.skip(), plain_html(news), gr.skip()
                    else:
                        yield news, plain_html(line[0]), gr.skip()
        except gr.Error as error:  # shown in the status line
            yield gr.skip(), f"**That did not work.** {error.message}", gr.skip()
        finally:
            self.runs.end(ticket)
