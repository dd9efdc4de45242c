"""Opens a page in the browser to play with completions: pick a picture, draw a mask, look at what
many codes make of it, walk between codes.

python scripts/explore.py demo/imle_mnist.pt demo/mnist_val.tar"""

import errno
import html
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import _path  # noqa: F401 (makes the modules importable)
from complete import model_flags, overrides_of
from exploring.completions import Explorer
from exploring.page import Changes, Library, Page
from exploring.pieces import THUMBS, painter_html, thumbs_html
from exploring.views import LARGEST_FILE, MOST_CODES, ORDERS, read_settings

from internals.parsing import Parser, whole
from internals.processes import run_command
from internals.weights import SOURCES
from Utils import InputError, default_device, first_line, naming

HERE = Path(__file__).resolve().parent
MODEL, DATA = (
    os.path.relpath(HERE.parent / "demo" / name) for name in ("imle_mnist.pt", "mnist_val.tar")
)
PORTS = range(7860, 7960)
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
INSTALL = "pip install 'gradio>=6'"
LARGE = 100  # pixels: larger pictures are shown larger, and smoothly
LARGE_CSS = """.shown img { image-rendering: auto }
.tiles { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important }"""
INTRO = """# One masked picture, many completions
A network sees only **some patches** of a picture and has to guess the rest. It gets a **code**
beside them: a list of random numbers. The same patches with another code are completed in another
way. Draw on the mask, look at the completions, press <kbd>r</kbd> for new codes, and walk from one
completion to another with <kbd>←</kbd> <kbd>→</kbd>."""
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
        state, first = gr.State(view), gr.State(0)  # first: index of the first thumbnail
        connect(gr, blocks, page, lay_out(gr, view, len(page.explorers) > 1), state, first)
    return blocks


def lay_out(gr, view, several):
    """The parts of the page, by name. several: whether two models are compared."""
    on = SimpleNamespace()
    gr.Markdown(INTRO)
    on.message = gr.HTML(elem_id="message")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("### 1 · Pick a picture")
            on.thumbs = gr.HTML(js_on_load=CLICKED.replace("NAME", "index"), elem_id="thumbs")
            with gr.Row():
                on.back, on.next, on.other = (
                    gr.Button(text, size="sm", min_width=60)
                    for text in ("◀ before", "next ▶", "any")
                )
            with gr.Row(elem_id="upload"):
                on.upload = gr.UploadButton("your own: choose, drop or paste a picture", size="sm")
            gr.Markdown("### 2 · Mask it\nClick patches, or draw over them.")
            on.painter = gr.HTML(js_on_load=PAINTED, elem_id="painter")
            on.note = gr.HTML(elem_id="note")
            on.ratio = gr.Slider(0, 1, view.ratio, step=0.01, label="share masked at random")
            on.masks = {}
            for names in (("random", "block", "centre"), ("show all", "hide all")):
                with gr.Row():
                    for name in names:
                        on.masks[name] = gr.Button(name, size="sm", min_width=60)
        with gr.Column(scale=5, min_width=300):
            gr.Markdown("### 3 · Completions\nClick up to three, to walk between them below.")
            with gr.Row():
                on.draw = gr.Button(
                    "new codes (r)", variant="primary", size="sm", elem_id="draw", min_width=90
                )
                on.codes = gr.Slider(
                    1, MOST_CODES, view.codes, step=1, label="codes", min_width=150
                )
                on.order = gr.Dropdown(ORDERS, value=view.order, label="order", min_width=150)
            with gr.Row():
                clicked = CLICKED.replace("NAME", "code")
                on.grid = gr.HTML(js_on_load=clicked, elem_id="grid", min_width=300)
                on.compared = gr.HTML(elem_id="compared", min_width=300, visible=several)
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown(
                "### 4 · Walk from code to code\nFrom A to B; with a C also over the plane "
                "through all three."
            )
            on.walk, on.plane = gr.HTML(js_on_load=WALKED, elem_id="walk"), gr.HTML(elem_id="plane")
        with gr.Column(min_width=300):
            gr.Markdown("### 5 · Where codes matter")
            on.deviation = gr.HTML(elem_id="deviation")
    gr.Markdown("### 6 · Keep it")
    on.command = gr.Textbox(
        label="the command that draws this grid (picture.png is saved below)",
        buttons=["copy"],
        interactive=False,
        elem_id="command",
    )
    with gr.Row(elem_id="keep"):
        on.save = gr.Button("save pictures and settings", size="sm", elem_id="save")
        on.reopen = gr.UploadButton("open settings (view.json)", size="sm")
    on.files = gr.File(label="saved", visible=False, file_count="multiple", elem_id="files")
    return on


def connect(gr, blocks, page, on, state, first):
    """Makes the parts `on` the page react to events. state: holds the View."""
    shown = [on.note, on.grid, on.compared, on.walk, on.plane, on.deviation, on.command]
    shown += [state, first, on.message, on.thumbs, on.painter, on.files]
    shown += [on.ratio, on.codes, on.order]

    def show(view, start, progress):
        """The values of all parts for a view."""
        values = page.parts(view, progress)
        return {getattr(on, name): value for name, value in values.items()} | {
            state: view,
            first: start,
            on.message: "",
            on.thumbs: thumbs_html(page.library, start, view.picture),
            on.painter: painter_html(view, page.grid),
            on.files: gr.update(visible=False, value=None),
            on.ratio: view.ratio,
            on.codes: view.codes,
            on.order: view.order,
        }

    def when(event, change, *inputs, leave=(), start_of=lambda start: start):
        """At an event, shows the view change(view, event, *values of inputs). Errors become a line
        in the page. leave: parts that stay; start_of: gives the index of the first thumbnail."""

        def react(view, start, event: gr.EventData, progress=gr.Progress(), *values):  # noqa: B008
            try:
                with page.busy:
                    new, start = change(view, event, *values), start_of(start)
                    outputs = show(new, start, lambda done, n: progress((done, n), unit="codes"))
                return {part: outputs[part] for part in outputs if part not in leave}
            except Exception as error:  # of any kind: no traceback in the page
                text = html.escape(first_line(error))
                return {on.message: f'<p class="message" role="alert">{text}</p>'}

        event(
            react,
            [state, first, *inputs],
            shown,
            show_progress="full" if page.is_slow else "hidden",
            show_progress_on=[on.grid],
            trigger_mode="always_last",
            api_visibility="private",
        )

    def save(view):
        """The files that are saved, to fetch."""
        with page.busy:
            return gr.update(value=page.save(view, blocks.GRADIO_CACHE), visible=True)

    changes, last = Changes(page), (len(page.library) - 1) // THUMBS * THUMBS
    same = [on.thumbs, first]  # what stays when the picture stays
    still = [*same, on.painter]  # and when the mask stays
    when(blocks.load, lambda view, event: view)
    when(on.thumbs.click, changes.pick, leave=[first])
    when(on.back.click, lambda view, event: view, start_of=lambda n: max(0, n - THUMBS))
    when(on.next.click, lambda view, event: view, start_of=lambda n: min(last, n + THUMBS))
    when(on.other.click, changes.pick_random)
    when(on.upload.upload, changes.upload, on.upload)
    when(on.painter.input, changes.paint, leave=[*still, on.ratio])
    when(on.ratio.input, changes.random_mask, on.ratio, leave=[*same, on.ratio])
    for name, button in on.masks.items():
        when(button.click, partial(changes.mask, name), leave=same)
    when(on.draw.click, changes.draw, leave=still)
    when(on.codes.input, changes.count, on.codes, leave=[*still, on.codes])
    when(on.order.input, changes.order, on.order, leave=[*still, on.order])
    when(on.grid.click, changes.choose, leave=still)
    when(on.reopen.upload, changes.reopen, on.reopen)
    on.save.click(save, state, on.files, api_visibility="private")


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
    # fmt: on
    model_flags(parser)
    args = parser.parse_args(argv)
    run_command(lambda: start(args))


def start(args):
    """Puts the page together and serves it."""
    port = free_port(args.host, args.port)
    with tempfile.TemporaryDirectory() as folder:  # for uploads and what is saved
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr  # optional, and slow to import
        except ImportError as error:
            raise InputError(f"the page needs gradio ({error}): {INSTALL}") from None
        if int(gr.__version__.split(".")[0]) < 6:
            raise InputError(f"the page needs gradio 6, here is {gr.__version__}: {INSTALL}")
        page, view = make_page(args)
        blocks = build(gr, page, view)
        number = serve(blocks, page, args.host, port, gr.themes.Default(**FONTS), args.no_browser)
    sys.exit(130 if number == signal.SIGINT else 0)


def free_port(host, port):
    """The port, or without one the first free one from 7860 on; an InputError if none is free."""
    for number in [port] if port else PORTS:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, number), family=family).close()
            return number
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    raise InputError(f"--host {host}, --port {number}: {reason}")


def serve(blocks, page, host, port, theme, no_browser):
    """Serves the page until Ctrl-C or SIGTERM; returns the signal's number."""
    css, script = ((HERE / "exploring" / name).read_text() for name in ("page.css", "page.js"))
    if max(page.size) > LARGE:
        css += LARGE_CSS
    # gradio asks its own server whether it is there: no proxy must stand between.
    os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},{host},localhost,127.0.0.1"
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=not no_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            max_file_size=LARGEST_FILE,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            theme=theme,
            css=css,
            head=f"<script>{script}</script>",
        )
    except (OSError, ValueError) as error:  # ValueError: a proxy stands before this machine
        raise InputError(f"--port, --host: {first_line(error)}") from None
    print(f"{address} shows the page, until Ctrl-C ends it", flush=True)
    ended, numbers = threading.Event(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (numbers.append(number), ended.set()))
    ended.wait()
    blocks.close(verbose=False)
    page.busy.acquire()  # torch aborts if a thread still computes when the program ends
    return numbers[0]


def make_page(args):
    """The Page, and the View that it opens with."""
    overrides = overrides_of(args)
    device = default_device()
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
