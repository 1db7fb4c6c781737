# SPDX-License-Identifier: Apache-2.0
"""`flash-hf demo`: what the page answers, through gradio's own client, and what is refused; `make browser` also uses
the page in Chromium."""

import re
import shutil
import socket
import sys
import threading
import time

import pytest
import torch

from flash_hf import FlashForSequenceClassification, commands
from helpers import ROOT, make_model, tiny_config


gradio = pytest.importorskip("gradio")
page = pytest.importorskip("flash_hf.commands.page")

CAUSAL, MASKED = (str(path) for path in sorted((ROOT / "model_cards").glob("flash-*")))
TEXT = "The captain looked at the sea, and the captain"


@pytest.fixture(scope="module")
def models():
    return {name: page.load_shown(name, torch.device("cpu")) for name in (CAUSAL, MASKED)}


@pytest.fixture(scope="module")
def address(models):
    built = page.build_page(models)
    yield page.launch(built)
    built.close()


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def test_a_text_is_continued_piece_by_piece(client, models):
    job = client.submit(CAUSAL, TEXT, 20, 0, 1, api_name="/generate")
    found, _ = job.result()
    pieces = [piece for piece, _ in job.outputs()]
    assert len(pieces) > 3 and all(later.startswith(piece) for piece, later in zip(pieces, pieces[1:], strict=False))
    model, tokenizer = models[CAUSAL]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_closing_the_iterator_ends_the_generation(models):
    before = threading.active_count()
    pieces = models[CAUSAL].continue_text(TEXT, 2000, 0.8, 0.9)
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_an_error_of_the_generation_is_shown(models, monkeypatch):
    monkeypatch.setattr(models[CAUSAL].model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(gradio.Error, match="division by zero"):
        list(models[CAUSAL].continue_text(TEXT, 5, 0, 1))


def test_masks_are_filled(client):
    parts, table = client.predict(MASKED, "She opened the<|mask|> and went into the<|mask|>.", api_name="/fill")
    tokens = [part["token"] for part in parts]
    assert tokens[0] == "She opened the" and tokens[2] == " and went into the" and tokens[4] == "."
    assert tokens[1].strip() == "door" and [len(row) for row in table["data"]] == [6, 6]
    assert table["data"][0][1].startswith("door (")


def test_looking_inside_marks_what_a_token_draws_on(client, models):
    layer, marked, said, weights, shares = client.predict(CAUSAL, TEXT, 3, api_name="/look")
    tokens, views = models[CAUSAL].look(TEXT)
    drawn = views[3].drawn(len(tokens) - 1)
    assert [part["token"] for part in marked] == tokens and f"Token {len(tokens) - 1}, **captain**" in said
    found = torch.tensor([part["class_or_confidence"] or 0 for part in marked])
    torch.testing.assert_close(found, drawn / drawn.max(), rtol=1e-4, atol=1e-5)
    assert weights["plot"].startswith("data:image/") and shares["plot"] != weights["plot"]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text_is_refused(client, text):
    for name, arguments in (
        ("/generate", (CAUSAL, text, 10, 0, 1)),
        ("/fill", (MASKED, text)),
        ("/look", (CAUSAL, text, 0)),
    ):
        with pytest.raises(Exception, match="There is no text yet"):
            client.predict(*arguments, api_name=name)
    with pytest.raises(Exception, match=r"put <\|mask\|> where a word is missing"):
        client.predict(MASKED, "No mask here.", api_name="/fill")


def test_a_long_text_is_cut(models, monkeypatch):
    shown = []
    monkeypatch.setattr(gradio, "Info", shown.append)
    tokens, views = models[MASKED].look("word " * 2000)
    assert len(tokens) == page.LONGEST == len(views[0].weights_NN) and "The first 512 of" in shown[0]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "the following arguments are required: FOLDER"),
        (["./none"], 1, "there is no folder ./none"),
        (["classifier"], 1, "FOLDER must hold one of FlashForCausalLM, FlashForMaskedLM, got FlashForSequenceClass"),
        ([CAUSAL, "--prot", "1"], 2, "Did you mean --port?"),
        ([CAUSAL, "--port", "70000"], 2, "must be at most 65535"),
        ([CAUSAL, "--port", "TAKEN"], 1, "--port must be free"),
    ],
)
def test_mistakes_end_in_one_sentence(options, code, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_model(FlashForSequenceClassification, tiny_config()).save_pretrained("classifier")
    capsys.readouterr()
    taken = socket.create_server(("127.0.0.1", 0))
    options = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in options]
    monkeypatch.setattr(sys, "argv", ["flash-hf", "demo", *options])
    with taken, pytest.raises(SystemExit) as ended:
        commands.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code and out == "" and words in err.splitlines()[-1]


@pytest.fixture
def browser(address):
    """The page in Chromium, which asks nothing of other machines."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1200, "height": 1000})
        asked, errors = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(error))
        tab.goto(address)
        yield tab
        chromium.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))] and not errors


def test_in_a_browser_text_streams_and_stops(browser):
    from playwright.sync_api import expect

    text, found = browser.get_by_label("Text", exact=True).first, browser.get_by_label("Continuation")
    text.fill("")
    browser.get_by_role("button", name="Continue").click()
    expect(browser.get_by_text("There is no text yet")).to_be_visible()
    text.press_sequentially(TEXT)
    assert text.input_value() == TEXT
    browser.get_by_label("number input for New tokens").fill("2000")
    before = threading.active_count()
    browser.get_by_role("button", name="Continue").click()
    expect(found).to_have_value(re.compile(r"\w+"), timeout=30_000)
    first = found.input_value()
    expect(found).not_to_have_value(first, timeout=30_000)
    assert found.input_value().startswith(first)
    browser.get_by_role("button", name="Stop").click()
    browser.wait_for_timeout(1500)
    stopped = found.input_value()
    browser.wait_for_timeout(1500)
    assert found.input_value() == stopped and threading.active_count() <= before + 1
    # And once more, to the end.
    browser.get_by_label("number input for New tokens").fill("10")
    browser.get_by_role("button", name="Continue").click()
    expect(found).not_to_have_value(stopped, timeout=30_000)


def test_in_a_browser_masks_and_the_view_inside(browser):
    from playwright.sync_api import expect

    browser.get_by_role("tab", name="Fill masks").click()
    box = browser.get_by_label("Text with <|mask|>")
    box.fill("No mask here.")
    browser.get_by_role("button", name="Fill", exact=True).click()
    expect(browser.get_by_text("There is no mask yet")).to_be_visible()
    box.fill("She opened the<|mask|>.")
    browser.get_by_role("button", name="Fill", exact=True).click()
    expect(browser.get_by_test_id("cell-0-1")).to_contain_text(re.compile(r"door \(\d+%\)"), timeout=30_000)

    browser.get_by_role("tab", name="Look inside").click()
    browser.get_by_label("Text", exact=True).last.fill(TEXT)
    browser.get_by_role("button", name="Look inside").click()
    expect(browser.get_by_text("draws on the coloured tokens")).to_contain_text("captain", timeout=30_000)
    pictures = browser.get_by_test_id("matplotlib").locator("img")
    expect(pictures).to_have_count(2)
    before = pictures.first.get_attribute("src")
    browser.get_by_text("sea", exact=True).click()
    expect(browser.get_by_text("draws on the coloured tokens")).to_contain_text("sea", timeout=30_000)
    expect(pictures.first).not_to_have_attribute("src", before)
