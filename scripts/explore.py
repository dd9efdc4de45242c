"""Opens a page in the browser to play with completions: pick a picture, draw a mask, look at what
many codes make of it, walk between codes.

python scripts/explore.py demo/imle_mnist.pt demo/mnist_val.tar"""

import html
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
import zipfile
from functools import lru_cache, partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import _path  # noqa: E402, F401 (makes the modules importable)
import torch  # noqa: E402
from complete import open_picture  # noqa: E402
from explore_html import (  # noqa: E402
    THUMBS,
    deviation_html,
    grid_html,
    histogram_html,
    mask_note,
    painter_html,
    plane_html,
    thumbs_html,
    walk_html,
)
from exploring import (  # noqa: E402
    LARGEST_FILE,
    MOST_CODES,
    ORDERS,
    PLANE,
    USUAL_RATIO,
    Explorer,
    View,
    animation,
    block_mask,
    centre_mask,
    command_of,
    decoded,
    encoded,
    fitted,
    open_upload,
    overlay,
    picture_of,
    plane_weights,
    random_mask,
    read_settings,
    walk_weights,
)

import Data  # noqa: E402
from internals.parsing import SWITCH, Parser, whole  # noqa: E402
from internals.plots import NORMALIZED, picture_grid  # noqa: E402
from internals.processes import run_command  # noqa: E402
from internals.stores import ImageError  # noqa: E402
from internals.weights import SOURCES  # noqa: E402
from IO import height_and_width  # noqa: E402
from Utils import InputError, first_line, naming, permutation  # noqa: E402

HERE = Path(__file__).resolve().parent
MODEL, DATA = (
    os.path.relpath(HERE.parent / "demo" / name) for name in ("imle_mnist.pt", "mnist_val.tar")
)
FIRST_MASKS = 6  # masks of each thumbnail from which the first view is chosen
INTRO = """# One masked picture, many completions
A network sees only **some patches** of a picture and has to guess the rest. It gets a **code**
beside them: a list of random numbers. The same patches with another code are completed in another
way. Draw on the mask, look at the completions, press <kbd>r</kbd> for new codes, and walk from one
completion to another with <kbd>←</kbd> <kbd>→</kbd>."""


# -------------------------------------------------------------------------------------------------
# Pictures to pick from.


class Library:
    """The pictures of a data set, in a random order, so that classes mix, or the files of the
    command line; fitted to the model's size."""

    def __init__(self, paths, size):
        self.size, self.paths, self.images = size, paths, None
        path = Path(paths[0]).expanduser()
        if len(paths) == 1 and (path.is_dir() or path.suffix in (".tar", ".lmdb")):
            self.images = Data.open_images(path)
            self.places = permutation(len(self.images), 0).tolist()
        else:
            for path in paths:
                open_picture(path)  # an InputError for a file that is no picture
        self.encoded = lru_cache(256)(self._encoded)

    def __len__(self):
        return len(self.paths if self.images is None else self.images)

    def name(self, index):
        """The path of a file, or the name of a picture in a data set."""
        if self.images is None:
            return str(self.paths[index])
        return self.images.name(self.places[index])

    def _encoded(self, index):
        """The picture as a PNG in base64; an InputError if it is damaged."""
        try:
            picture = (
                open_picture(self.paths[index])
                if self.images is None
                else self.images.load(self.places[index]).convert("RGB")
            )
        except ImageError as error:
            raise InputError(str(error)) from None
        return encoded(fitted(picture, self.size))


# -------------------------------------------------------------------------------------------------
# The page.


class Page:
    """What the page's parts show for a View."""

    def __init__(self, library, explorers):
        self.library, self.explorers = library, explorers
        self.main = explorers[0]
        self.size, self.grid = self.main.config.image_size, self.main.config.grid
        self.n_patches = self.main.n_patches
        self.show_progress = "hidden"  # of gradio; "full" for a slow model

    def first_view(self):
        """The view that the page opens with."""
        compare = self.explorers[1].source if len(self.explorers) > 1 else ""
        views = [
            View(
                self.library.encoded(index),
                self.library.name(index),
                random_mask(self.n_patches, USUAL_RATIO, mask_seed),
                mask_seed=mask_seed,
                model=self.main.source,
                compare=compare,
            )
            for index in range(min(THUMBS, len(self.library)))
            for mask_seed in range(FIRST_MASKS)
        ]
        start = time.perf_counter()
        self.main.complete(views[0])
        seconds = time.perf_counter() - start
        self.show_progress = "full" if seconds > 1 else "hidden"
        if seconds > 0.1 or not self.main.code_dim:
            return views[0]
        # Where that takes no time: the picture and mask whose completions differ most.
        return max(views, key=lambda view: self.main.complete(view).deviation().mean())

    def parts(self, view, progress):
        """The page's parts for a view, as HTML by name; the command as text."""
        results = [explorer.complete(view, progress) for explorer in self.explorers]
        chosen = self.chosen(view, results[0])
        grids = []
        for explorer, done in zip(self.explorers, results, strict=True):
            name = f"<h4>{html.escape(explorer.source)}</h4>" if len(results) > 1 else ""
            chosen_here = chosen if explorer is self.main else ()
            grids.append(name + grid_html(view, done, explorer, chosen_here) + histogram_html(done))
        return {
            "note": mask_note(view, self.n_patches),
            "grid": grids[0],
            "compared": grids[1] if grids[1:] else "",
            "walk": walk_html(self.walk(view, chosen)) if chosen[1:] else self.no_walk(),
            "plane": plane_html(self.plane(view, chosen)) if chosen[2:] else "",
            "deviation": deviation_html(results[0]) if self.main.code_dim else "",
            "command": self.command(view, results[0]),
        }

    def chosen(self, view, done):
        """The codes A, B and C; at first two very different ones."""
        return tuple(n for n in view.chosen or done.ends() if n < len(done.cells))

    def walk(self, view, chosen):
        """Frames from code A to code B."""
        return self.main.mixtures(view, chosen[:2], walk_weights())

    def plane(self, view, chosen):
        """Completions on the plane through A, B and C."""
        return self.main.mixtures(view, chosen, plane_weights())

    def command(self, view, done):
        """The command that draws the grid; "" if nothing is masked."""
        return "" if done.plain_loss is None else command_of(view, done.order(view.order))

    def no_walk(self):
        """What stands in place of a walk."""
        text = "choose two completions" if self.main.code_dim else "this model has no codes"
        return f'<p class="faint">No walk: {text}.</p>'

    def save(self, view, folder):
        """Writes what is shown to a new folder; returns the paths."""
        folder = Path(tempfile.mkdtemp(dir=folder))
        (folder / "view.json").write_text(view.to_json())
        decoded(view.picture).save(folder / "picture.png")
        results = [explorer.complete(view) for explorer in self.explorers]
        for done, name in zip(results, ("completions.png", "compared.png"), strict=False):
            order = done.order(view.order)
            first = torch.stack([done.image, done.masked, done.plain])
            cells = torch.cat([first, done.cells[order]])
            headers = ["image", "masked", "no code", *(f"code {n + 1}" for n in order)]
            explorer = self.explorers[name == "compared.png"]
            caption = f"Completions by {explorer.source}."
            caption += NORMALIZED * explorer.config.norm_pix_loss
            picture_grid(cells[None], headers, caption).save(folder / name)
        done, chosen = results[0], self.chosen(view, results[0])
        picture_of(overlay(done.image, done.deviation())).save(folder / "deviation.png")
        if chosen[1:]:
            frames = self.walk(view, chosen)
            animation(frames, folder / "walk.webp")
            picture_grid(frames[None], [""] * len(frames), "From A to B.").save(folder / "walk.png")
        if chosen[2:]:
            cells = self.plane(view, chosen).unflatten(0, (PLANE, PLANE))
            picture_grid(cells, [""] * PLANE, "Through three codes.").save(folder / "plane.png")
        if command := self.command(view, done):
            (folder / "command.txt").write_text(command + "\n")
        paths = sorted(folder.iterdir())
        with zipfile.ZipFile(folder / "everything.zip", "w") as file:
            for path in paths:
                file.write(path, path.name)
        return [str(folder / "everything.zip"), *map(str, paths)]


CLICKED = """element.addEventListener("click", event => {
  const target = event.target.closest("[data-NAME]");
  if (target) trigger("click", {NAME: +target.dataset.NAME});
})"""
PAINTED = """element.addEventListener("mask", event => trigger("input", {visible: event.detail}))"""
# A new walk is shown at the place where the slider stands.
WALKED = """watch("value", () => {
  element.querySelector("input")?.dispatchEvent(new Event("input", {bubbles: true}));
})"""


def build(gr, page, view):
    """The gradio page; `view` is what it opens with."""
    with gr.Blocks(title="IMLE-SSL: completions", analytics_enabled=False) as blocks:
        state, first = gr.State(view), gr.State(0)
        gr.Markdown(INTRO)
        message = gr.HTML(elem_id="message")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### 1 · Pick a picture")
                thumbs = gr.HTML(js_on_load=CLICKED.replace("NAME", "index"), elem_id="thumbs")
                with gr.Row():
                    back, on_button, other = (
                        gr.Button(text, size="sm", min_width=60)
                        for text in ("◀ before", "next ▶", "any")
                    )
                with gr.Row(elem_id="upload"):
                    upload = gr.UploadButton("your own: choose, drop or paste a picture", size="sm")
                gr.Markdown("### 2 · Mask it\nClick patches, or draw over them.")
                painter = gr.HTML(js_on_load=PAINTED, elem_id="painter")
                note = gr.HTML(elem_id="note")
                ratio = gr.Slider(0, 1, view.ratio, step=0.01, label="share masked at random")
                masks = {}
                for names in (("random", "block", "centre"), ("show all", "hide all")):
                    with gr.Row():
                        for name in names:
                            masks[name] = gr.Button(name, size="sm", min_width=60)
            with gr.Column(scale=5, min_width=300):
                gr.Markdown("### 3 · Completions\nClick up to three, to walk between them below.")
                with gr.Row():
                    draw = gr.Button(
                        "new codes (r)", variant="primary", size="sm", elem_id="draw", min_width=90
                    )
                    codes = gr.Slider(
                        1, MOST_CODES, view.codes, step=1, label="codes", min_width=150
                    )
                    order = gr.Dropdown(ORDERS, value=view.order, label="order", min_width=150)
                grid = gr.HTML(js_on_load=CLICKED.replace("NAME", "code"), elem_id="grid")
                compared = gr.HTML(elem_id="compared", visible=len(page.explorers) > 1)
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown(
                    "### 4 · Walk from code to code\nFrom A to B; with a C also over the plane "
                    "through all three."
                )
                walk, plane = gr.HTML(js_on_load=WALKED, elem_id="walk"), gr.HTML(elem_id="plane")
            with gr.Column(min_width=300):
                gr.Markdown("### 5 · Where codes matter")
                deviation = gr.HTML(elem_id="deviation")
        gr.Markdown("### 6 · Keep it")
        command = gr.Textbox(
            label="the command that draws this grid (picture.png is saved below)",
            buttons=["copy"],
            interactive=False,
            elem_id="command",
        )
        with gr.Row(elem_id="keep"):
            save = gr.Button("save pictures and settings", size="sm", elem_id="save")
            reopen = gr.UploadButton("open settings (view.json)", size="sm")
        files = gr.File(label="saved", visible=False, file_count="multiple", elem_id="files")

        parts = {"note": note, "grid": grid, "compared": compared, "walk": walk, "plane": plane}
        parts |= {"deviation": deviation, "command": command}
        controls = {"ratio": ratio, "codes": codes, "order": order}
        shown = [message, state, first, thumbs, painter, files, *parts.values(), *controls.values()]

        def show(view, start, progress=lambda done, total: None):
            """The values of all parts for a view."""
            values = {parts[name]: value for name, value in page.parts(view, progress).items()}
            return values | {
                message: "",
                state: view,
                first: start,
                thumbs: thumbs_html(page.library, start, view.picture),
                painter: painter_html(view, page.grid),
                files: gr.update(visible=False, value=None),
                ratio: view.ratio,
                codes: view.codes,
                order: view.order,
            }

        def on(register, change, *inputs, leave=(), start_of=lambda start: start):
            """On an event, shows the view change(view, event, *values of inputs). Errors become a
            line in the page. leave: parts that stay; start_of: the index of the first thumbnail."""

            def react(view, start, event: gr.EventData, progress=gr.Progress(), *values):  # noqa: B008
                try:
                    new, start = change(view, event, *values), start_of(start)
                    outputs = show(new, start, lambda done, n: progress((done, n), unit="codes"))
                    return {part: outputs[part] for part in outputs if part not in leave}
                except Exception as error:  # of any kind: no traceback in the page
                    text = html.escape(first_line(error))
                    return {message: f'<p class="message" role="alert">{text}</p>'}

            register(
                react,
                [state, first, *inputs],
                shown,
                show_progress=page.show_progress,
                trigger_mode="always_last",
                api_visibility="private",
                concurrency_id="model",
            )

        changes = Changes(page)
        same = [thumbs, first]
        still = [*same, painter]  # what stays when the mask stays
        on(blocks.load, lambda view, event: view)
        on(thumbs.click, changes.pick, leave=[first])
        on(back.click, lambda view, event: view, start_of=lambda n: max(0, n - THUMBS))
        last = (len(page.library) - 1) // THUMBS * THUMBS
        on(on_button.click, lambda view, event: view, start_of=lambda n: min(last, n + THUMBS))
        on(other.click, changes.pick_random)
        on(upload.upload, changes.upload, upload)
        on(painter.input, changes.paint, leave=[*still, ratio])
        on(ratio.input, changes.random_mask, ratio, leave=[*same, ratio])
        for name, button in masks.items():
            on(button.click, partial(changes.mask, name), leave=same)
        on(draw.click, changes.draw, leave=still)
        on(codes.input, changes.count, codes, leave=[*still, codes])
        on(order.input, changes.order, order, leave=[*still, order])
        on(grid.click, changes.choose, leave=still)
        on(reopen.upload, changes.reopen, reopen)
        save.click(
            lambda view: gr.update(value=page.save(view, blocks.GRADIO_CACHE), visible=True),
            state,
            files,
            api_visibility="private",
            concurrency_id="model",
        )
    return blocks


class Changes:
    """What events make of a view. Values come from a browser: all are checked."""

    def __init__(self, page):
        self.page = page

    def pick(self, view, event):
        """Another picture of the library."""
        return self.of_library(view, number_of(event, "index", len(self.page.library)))

    def pick_random(self, view, event):
        """Any picture of the library."""
        return self.of_library(view, secrets.randbelow(len(self.page.library)))

    def of_library(self, view, index):
        """The picture with this index."""
        library = self.page.library
        return view.changed(picture=library.encoded(index), name=library.name(index), chosen=())

    def upload(self, view, event, path):
        """A picture that was sent."""
        picture = encoded(fitted(open_upload(path), self.page.size))
        return view.changed(picture=picture, name=Path(path).name, chosen=())

    def reopen(self, view, event, path):
        """Settings that were saved; the models stay."""
        new = read_settings(path, self.page.size, self.page.n_patches)
        return new.changed(model=view.model, compare=view.compare)

    def paint(self, view, event):
        """The mask that was drawn."""
        visible = event._data.get("visible") if isinstance(event._data, dict) else None
        n_patches = self.page.n_patches
        if not isinstance(visible, list) or not set(visible) <= set(range(n_patches)):
            raise InputError(f"a mask is a list of patches from 0 to {n_patches - 1}")
        return view.changed(visible=tuple(sorted(set(visible))))

    def random_mask(self, view, event, ratio):
        """A random mask of another ratio, with the same seed."""
        visible = random_mask(self.page.n_patches, ratio, view.mask_seed)
        return view.changed(visible=visible, ratio=ratio)

    def mask(self, name, view, event):
        """The mask of a button."""
        n_patches, grid = self.page.n_patches, self.page.grid
        seed = secrets.randbelow(2**31)
        masks = {
            "random": lambda: random_mask(n_patches, view.ratio, seed),
            "block": lambda: block_mask(grid, seed),
            "centre": lambda: centre_mask(grid),
            "show all": lambda: tuple(range(n_patches)),
            "hide all": lambda: (),
        }
        return view.changed(visible=masks[name](), mask_seed=seed)

    def draw(self, view, event):
        """New codes."""
        return view.changed(seed=secrets.randbelow(2**31), chosen=())

    def count(self, view, event, codes):
        """More or fewer codes."""
        return view.changed(codes=int(codes), chosen=tuple(n for n in view.chosen if n < codes))

    def order(self, view, event, order):
        """Another order."""
        return view.changed(order=order)

    def choose(self, view, event):
        """Chooses a code, or gives it up; of more than three the first goes."""
        done = self.page.main.complete(view)
        code = number_of(event, "code", len(done.cells))
        chosen = self.page.chosen(view, done)
        chosen = tuple(n for n in chosen if n != code) if code in chosen else (*chosen, code)
        return view.changed(chosen=chosen[-3:])


def number_of(event, name, count):
    """The number in an event of the page; an InputError if it is not below count."""
    number = event._data.get(name) if isinstance(event._data, dict) else None
    if type(number) is not int or not 0 <= number < count:
        raise InputError(f"no such {name}")
    return number


# -------------------------------------------------------------------------------------------------
# The command.


def main(argv=None):
    """Opens the page and serves it until Ctrl-C."""
    parser = Parser(
        prog="explore.py",
        description=" ".join(__doc__.split("\n\n")[0].split()),
        usage="explore.py [MODEL] [PICTURES or DATA] [flags]",
    )
    add = parser.add_argument
    # fmt: off
    add("model", nargs="?", metavar="MODEL", help=f"Weights of the model: {SOURCES}; default: the "
        "demo's.")
    add("pictures", nargs="*", metavar="PICTURES or DATA", help="Image files, or a data set as of "
        "TrainIMLE.py; default: the demo's digits.")
    add("--compare", metavar="MODEL", help="Another model, shown on the same masks and codes.")
    add("--open", metavar="FILE", help="Settings (view.json) that the page saved, to go on with.")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on. 127.0.0.1: "
        "only this machine can open the page; 0.0.0.0: every machine that reaches this one can.")
    add("--port", type=whole(1, 65535), metavar="N", help="Port; default: the first free one from "
        "7860 on.")
    add("--no_browser", action="store_true", help="Opens no browser, only prints the address.")
    add("--input_size", type=whole(1), nargs="+", metavar="PIXELS", help="Side, or height and "
        "width, of the images that the network sees; default: the model's own size.")
    add("--norm_pix_loss", **SWITCH, help="What the model predicts. 1: normalised patches; 0: "
        "pixels; default: as MODEL's file says, else 1.")
    # fmt: on
    args = parser.parse_args(argv)
    run_command(lambda: start(args))


def start(args):
    """Puts the page together and serves it."""
    with tempfile.TemporaryDirectory() as folder:  # for uploads and what is saved
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio as gr  # optional, and slow to import
        except ImportError as error:
            raise InputError(f"the page needs gradio ({error}): pip install gradio") from None
        page, view = make_page(args)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes
        serve(gr, args, build(gr, page, view))


def serve(gr, args, blocks):
    """Serves the page until Ctrl-C."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, address, _ = blocks.launch(
            server_name=args.host,
            server_port=args.port,
            inbrowser=not args.no_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            max_file_size=LARGEST_FILE,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            theme=gr.themes.Default(**fonts),
            css=(HERE / "explore.css").read_text(),
            head=f"<script>{(HERE / 'explore.js').read_text()}</script>",
        )
    except OSError as error:
        raise InputError(f"--port, --host: {first_line(error)}") from None
    print(f"{address} shows the page, until Ctrl-C ends it", flush=True)
    threading.Event().wait()


def make_page(args):
    """The Page, and the View that it opens with."""
    overrides = {}
    if args.input_size:
        overrides["image_size"] = tuple(height_and_width(args.input_size))
    if args.norm_pix_loss is not None:
        overrides["norm_pix_loss"] = bool(args.norm_pix_loss)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = settings_of(args.open) if args.open else {}
    model = args.model or settings.get("model") or MODEL
    compare = args.compare or (not args.model and settings.get("compare"))
    explorers = [Explorer(model, device, **overrides)]
    if compare:
        with naming("--compare"):
            explorers.append(Explorer(compare, device, **overrides))
        sizes = [(e.config.image_size, e.config.patch_size) for e in explorers]
        if sizes[0] != sizes[1]:
            reason = f"{compare} has images and patches of {sizes[1]}, {model} of {sizes[0]}"
            raise InputError(f"--compare: {reason}; compare models of the same sizes")
    page = Page(Library(args.pictures or [DATA], explorers[0].config.image_size), explorers)
    view = page.first_view()
    if args.open:
        with naming("--open"):
            saved = read_settings(args.open, page.size, page.n_patches)
        view = saved.changed(model=view.model, compare=view.compare)
    return page, view


def settings_of(path):
    """The models in settings, whose sizes tell what else may be in them; {} if there are none."""
    try:
        content = json.loads(Path(path).read_bytes())
        return {name: content[name] for name in ("model", "compare") if content.get(name)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # read_settings says what is wrong


if __name__ == "__main__":
    main()
