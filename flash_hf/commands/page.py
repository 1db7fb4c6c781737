# SPDX-License-Identifier: Apache-2.0
"""The page of `flash-hf demo`: continue a text, fill masks, look inside the attention."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr
import numpy as np
import torch
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .. import FlashConfig, FlashPreTrainedModel
from ..inspection import LayerView, look_inside
from ..sources import load_named


HEADS = {"FlashForCausalLM": AutoModelForCausalLM, "FlashForMaskedLM": AutoModelForMaskedLM}
LONGEST = 512  # tokens of a text to look inside: a layer's picture has the square of it
OPENING = "It was a cold evening in November, and the old house"
# Lewis Carroll, Alice's Adventures in Wonderland (1865): longer than a chunk, so that both branches have work.
PASSAGE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and \
what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and \
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the \
daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the \
Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" But when the Rabbit actually took a watch out of its \
waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind \
that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, and burning \
with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a large \
rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again."""


def refusal(message: str) -> gr.Error:
    """An error to raise, which the page shows."""
    return gr.Error(message, duration=8, print_exception=False)


class Shown(NamedTuple):
    """A model of the page, with its tokenizer."""

    model: FlashPreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> Tensor:
        """The ids of a text, `[1, N]`; a message on the page if there is none."""
        if not text.strip():
            raise refusal("There is no text yet: type a few words.")
        return self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(self.model.device)

    def continue_text(self, text: str, tokens: int, temperature: float, top_p: float) -> Iterator[tuple[str, str]]:
        """The continuation as it grows, and the time. Closing the iterator ends the generation."""
        ids, stop, errors = self.encode(text), threading.Event(), []
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}

        def stopped(input_ids: Tensor, scores: Tensor, **_) -> Tensor:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        def run() -> None:
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=int(tokens),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                    **sampling,
                )
            except Exception as error:  # raised below, in the page's thread
                errors.append(error)
            finally:
                streamer.end()

        begin, found = time.perf_counter(), ""
        threading.Thread(target=run, daemon=True).start()
        try:
            for piece in streamer:
                found += piece
                yield found, f"{time.perf_counter() - begin:.1f} s"
        finally:
            stop.set()
        if errors:
            raise gr.Error(str(errors[0])) from errors[0]

    def fill_masks(self, text: str) -> tuple[list[tuple[str, str | None]], list[list]]:
        """The text in parts, with its masks filled, and the likeliest tokens of each mask with their probabilities."""
        ids, (first, *rest) = self.encode(text), text.split(self.tokenizer.mask_token)
        places = (ids[0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        if not rest:
            raise refusal(f"There is no mask yet: put {self.tokenizer.mask_token} where a word is missing.")
        with torch.no_grad():
            found = self.model(ids).logits[0, places].float().softmax(-1).topk(5)
        parts, rows = [(first, None)], []
        for place, (piece, chances, tokens) in enumerate(zip(rest, found.values, found.indices, strict=True)):
            words = [self.tokenizer.decode(token) for token in tokens]
            parts += [(words[0], "filled"), (piece, None)]
            likely = zip(words, chances, strict=True)
            rows.append([place + 1, *(f"{word.strip()} ({chance:.0%})" for word, chance in likely)])
        return parts, rows

    def look(self, text: str) -> tuple[list[str], list[LayerView]]:
        """The tokens of a text and the attention of every layer."""
        ids = self.encode(text)
        if ids.shape[1] > LONGEST:
            gr.Info(f"The first {LONGEST} of {ids.shape[1]} tokens are shown.")
        ids = ids[:, :LONGEST]
        return [self.tokenizer.decode(token) for token in ids[0]], look_inside(self.model, ids)


def draw_weights(view: LayerView, layer: int, chosen: int) -> Figure:
    """The layer's weights, N x N, with a mark at the chosen token's row."""
    weights_NN = view.weights_NN.cpu().numpy()
    limit = max(abs(weights_NN).max(), 1e-30)
    # A few large weights must not hide all others.
    linear = max(np.quantile(abs(weights_NN), 0.9), limit / 1000)
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(weights_NN, cmap="RdBu_r", norm=AsinhNorm(linear, -limit, limit), interpolation="nearest")
    row = 1 - (chosen + 0.5) / len(weights_NN)
    axis.plot(-0.02, row, ">", color="black", transform=axis.transAxes, clip_on=False)
    axis.set(title=f"attention weights of layer {layer}", xlabel="token that is read", ylabel="token that reads")
    figure.colorbar(image, shrink=0.8, ticks=[-limit, 0, limit], format="%.2g")
    return figure


def draw_shares(views: list[LayerView], layer: int) -> Figure:
    """The mean share of the global branch by layer, over the tokens that it reaches."""
    shares = [view.global_share()[view.global_NN.any(1)] for view in views]
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = ["#e08214" if index == layer else "#9ecae1" for index in range(len(views))]
    axis.bar(range(len(views)), [share.mean().item() if len(share) else 0 for share in shares], color=colours)
    axis.set(ylim=(0, 1), xlabel="layer", ylabel="share (0 to 1)", title="share of the global branch")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def show_layer(seen: tuple[list[str], list[LayerView]] | None, layer: int, chosen: int) -> tuple:
    """Values of the page for one layer and one token: which tokens it draws on, weights, shares."""
    if seen is None:
        raise refusal("There is nothing to show yet: press Look inside.")
    tokens, views = seen
    chosen = min(chosen, len(tokens) - 1)
    drawn_N = views[layer].drawn(chosen)
    marked = list(zip(tokens, (drawn_N / drawn_N.max().clamp(min=1e-30)).tolist(), strict=True))
    said = f"Token {chosen}, **{tokens[chosen].strip()}**, draws on the coloured tokens. Click on another one."
    return marked, said, draw_weights(views[layer], layer, chosen), draw_shares(views, layer), chosen


def build_page(models: dict[str, Shown]) -> gr.Blocks:
    """The page for models by name: a tab for each thing that one of them can do."""
    causal = {name: shown for name, shown in models.items() if shown.model.config.is_decoder}
    masked = {name: shown for name, shown in models.items() if name not in causal}

    def choose(names: dict[str, Shown]) -> gr.Radio:
        return gr.Radio(list(names), value=next(iter(names)), label="Model", visible=len(names) > 1)

    with gr.Blocks(title="FLASH", analytics_enabled=False) as page:
        lines = ["# FLASH", "Language models whose time per token does not grow with the context."]
        for name, (model, _) in models.items():
            config, kind = model.config, "causal" if name in causal else "masked"
            lines.append(
                f"- **{name}**: {kind}, {model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} "
                f"layers of width {config.hidden_size}, trained on texts of {config.max_position_embeddings:,} tokens"
            )
        gr.Markdown("\n".join(lines))
        if causal:
            with gr.Tab("Continue a text"):
                which, text = choose(causal), gr.Textbox(OPENING, lines=4, label="Text")
                with gr.Row():
                    tokens = gr.Slider(10, 2000, 200, step=10, label="New tokens")
                    temperature = gr.Slider(0, 1.5, 0.8, step=0.1, label="Temperature")
                    top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
                with gr.Row():
                    go, stop = gr.Button("Continue", variant="primary"), gr.Button("Stop")
                found, spent = gr.Textbox(lines=10, label="Continuation"), gr.Markdown()

                def generate(name, *options):
                    yield from causal[name].continue_text(*options)

                options = [which, text, tokens, temperature, top_p]
                running = gr.on([go.click, text.submit], generate, options, [found, spent])
                stop.click(None, cancels=[running])
        if masked:
            with gr.Tab("Fill masks"):
                mask = next(iter(masked.values())).tokenizer.mask_token
                which = choose(masked)
                text = gr.Textbox(f"She opened the{mask} and went into the{mask}.", lines=4, label=f"Text with {mask}")
                go = gr.Button("Fill", variant="primary")
                filled = gr.HighlightedText(label="Filled", color_map={"filled": "orange"}, show_inline_category=False)
                headers = ["mask", "likeliest", "second", "third", "fourth", "fifth"]
                table = gr.Dataframe(headers=headers, label="Likeliest tokens, each mask by itself")

                def fill(name, text):
                    return masked[name].fill_masks(text)

                gr.on([go.click, text.submit], fill, [which, text], [filled, table])
        with gr.Tab("Look inside"):
            which, text = choose(models), gr.Textbox(PASSAGE, lines=4, max_lines=8, label="Text")
            go = gr.Button("Look inside", variant="primary")
            layers = max(shown.model.config.num_hidden_layers for shown in models.values())
            layer = gr.Slider(0, layers - 1, layers // 2, step=1, label="Layer")
            said = gr.Markdown()
            marked = gr.HighlightedText(label="Tokens", combine_adjacent=False)
            with gr.Row():
                weights, shares = gr.Plot(show_label=False), gr.Plot(show_label=False)
            seen, chosen = gr.State(), gr.State(0)
            views = [marked, said, weights, shares, chosen]

            def look(name, text, layer):
                found = models[name].look(text)
                layer = min(layer, len(found[1]) - 1)
                return found, gr.Slider(value=layer, maximum=len(found[1]) - 1), *show_layer(found, layer, LONGEST)

            def pick(seen, layer, event: gr.SelectData):
                return show_layer(seen, layer, event.index)

            gr.on([go.click, text.submit], look, [which, text, layer], [seen, layer, *views])
            layer.release(show_layer, [seen, layer, chosen], views)
            marked.select(pick, [seen, layer], views)
    return page


def load_shown(name: str, device: torch.device) -> Shown:
    """The model and tokenizer of a folder or a name on the Hub."""
    config = load_named(AutoConfig.from_pretrained, name, option="FOLDER")
    head = (config.architectures or ["a model without a head"])[0]
    if config.model_type != FlashConfig.model_type or head not in HEADS:
        raise ValueError(f"FOLDER must hold one of {', '.join(HEADS)}, got {head} in {name}.")
    model = load_named(HEADS[head].from_pretrained, name, option="FOLDER", dtype=torch.float32).to(device).eval()
    return Shown(model, load_named(AutoTokenizer.from_pretrained, name, option="FOLDER"))


def launch(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve the page from a thread of its own; its address. Without a port, the first free one from 7860 on.

    Raises:
        ValueError: the port is in use.
    """
    # Fonts of the system: gradio's own come from the network.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"theme": theme, "quiet": True, "ssr_mode": False, "footer_links": []}
    try:
        return page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **options)[1]
    except OSError as error:
        raise ValueError(f"--port must be free, and {port} is in use. Choose another one.") from error
