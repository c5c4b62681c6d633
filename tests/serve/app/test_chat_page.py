"""The chat page in headless Chromium, against live endpoints."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.app.live import MODEL, SERVICE, ScriptedEngine, endpoint, http, png, wait_until
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.generate.request import Delta, Prompt
from vila_ops.serve.app.keys import KeyLimits, create_key

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
expect.set_options(timeout=60_000)  # ms, for a busy machine

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> &amp; **bold**"


@pytest.fixture(scope="module")
def url(versions: tuple[ModelVersion, ModelVersion], module_scripted: ScriptedEngine) -> Iterator[str]:
    """An endpoint without keys."""
    service = SERVICE.with_changes({"max_images": 3, "max_body_bytes": 5000000, "max_image_pixels": 1000000})
    with endpoint(versions[0], module_scripted, service=service) as url:
        yield url


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A tab's storage and settings."""
    made = browser.new_context()
    made.grant_permissions(["clipboard-read", "clipboard-write"])
    made.set_default_timeout(60_000)
    yield made
    made.close()


@pytest.fixture
def page(context: Any, url: str) -> Any:
    """The page, connected."""
    return opened(context, url)


def opened(context: Any, url: str) -> Any:
    """The page at a URL, once it shows the model; whatever the browser complains about fails the test."""
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(url)
    expect(page.get_by_role("heading", level=1)).to_have_text(MODEL)
    return page


def says(engine: ScriptedEngine, *texts: str, finish: Any = "stop") -> None:
    """Let the engine answer with these pieces of text."""
    ids = [engine.tokenizer.text_ids(text) for text in texts]
    engine.script = [*(Delta(one, None) for one in ids[:-1]), Delta(ids[-1], finish)]
    engine.asked.clear()


def ask(page: Any, question: str, *, answer: str) -> None:
    """Ask and wait for the whole answer."""
    page.get_by_role("textbox", name="Question").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text(f"Answer: {answer}")


def prompt_of(engine: ScriptedEngine, index: int = -1) -> Prompt:
    """A prompt that the engine was asked."""
    return engine.asked[index][0]


def ids(engine: ScriptedEngine, *turns: tuple[str, str]) -> list[int]:
    """The prompt of a conversation of texts."""
    return engine.tokenizer.prompt([(role, (text,)) for role, text in turns])


def file(name: str, size: int) -> dict[str, Any]:
    """A PNG to choose."""
    return {"name": name, "mimeType": "image/png", "buffer": png(size, size)}


def give(page: Any, kind: str, target: str, *files: dict[str, Any]) -> None:
    """Drop or paste files as the browser does."""
    transfer = page.evaluate_handle(
        """(files) => { const transfer = new DataTransfer();
        for (const { name, type, bytes } of files) {
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
        }
        return transfer; }""",
        [{"name": one["name"], "type": one["mimeType"], "bytes": list(one["buffer"])} for one in files],
    )
    page.evaluate(
        """([kind, target, transfer]) => document.querySelector(target).dispatchEvent(kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }))""",
        [kind, target, transfer],
    )


def test_images_are_chosen_pasted_and_dropped_and_reach_the_model_in_their_order(
    page: Any, module_scripted: ScriptedEngine
) -> None:
    says(module_scripted, "Two", " of them")
    page.get_by_label("Add images").set_input_files([file("a.png", 8), file("gone.png", 12)])
    give(page, "paste", "#question", file("b.png", 16))
    give(page, "dragover", "main", file("c.png", 20))
    expect(page.get_by_text("Drop images here")).to_be_visible()
    give(page, "drop", "main", file("c.png", 20), {"name": "d.txt", "mimeType": "text/plain", "buffer": b"no"})
    expect(page.get_by_text("Drop images here")).to_be_hidden()
    expect(page.get_by_role("alert")).to_have_text("Not an image: d.txt.")
    page.get_by_role("button", name="Remove gone.png").click()
    ask(page, "How many?", answer="Two of them")
    shown = page.get_by_role("article", name="Question").get_by_role("img")
    assert [one.get_attribute("alt") for one in shown.all()] == ["a.png", "b.png", "c.png"]
    assert shown.evaluate_all("all => all.map(one => one.naturalWidth)") == [8, 16, 20]
    engine, prompt = module_scripted, prompt_of(module_scripted)
    assert len(prompt.images) == 3
    facts = page.get_by_role("article", name="Answer").locator(".facts")
    generated = len(engine.tokenizer.text_ids("Two")) + len(engine.tokenizer.text_ids(" of them"))
    of_images = 3 * engine.tokenizer.image_tokens
    expect(facts).to_contain_text(f"{len(prompt.input_ids)} ({of_images} of images) + {generated}")
    expect(facts).to_contain_text("first text after")


def test_an_answer_streams_shows_the_digest_and_is_stopped_in_the_engine(
    page: Any, versions: tuple[ModelVersion, ModelVersion], module_scripted: ScriptedEngine
) -> None:
    says(module_scripted, "Once upon", " a time")
    module_scripted.script.insert(1, 60.0)
    page.get_by_role("textbox", name="Question").fill("Tell me")
    page.get_by_role("button", name="Ask", exact=True).click()
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text("Once upon")
    assert module_scripted.running == 1
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped: Once upon")
    wait_until(lambda: module_scripted.running == 0)
    expect(answer).to_contain_text("stopped by you")
    assert answer.locator("code").get_attribute("title").endswith(versions[0].checkpoint.digest)
    says(module_scripted, "Yes")
    ask(page, "Go on", answer="Yes")
    turns = [("user", "Tell me"), ("assistant", "Once upon"), ("user", "Go on")]
    assert prompt_of(module_scripted).input_ids == ids(module_scripted, *turns)


def test_a_question_is_edited_and_asked_again_in_its_place(page: Any, module_scripted: ScriptedEngine) -> None:
    says(module_scripted, "First")
    ask(page, "One?", answer="First")
    ask(page, "Two?", answer="First")
    says(module_scripted, "Second")
    page.get_by_role("article", name="Question").first.get_by_role("button", name="Edit").click()
    expect(page.get_by_role("textbox", name="Question")).to_have_value("One?")
    ask(page, "Uno?", answer="Second")
    expect(page.get_by_role("article", name="Question")).to_have_count(1)
    assert prompt_of(module_scripted).input_ids == ids(module_scripted, ("user", "Uno?"))
    says(module_scripted, "Third")
    page.get_by_role("button", name="Ask again").click()
    expect(page.get_by_role("status")).to_have_text("Answer: Third")
    assert prompt_of(module_scripted).input_ids == ids(module_scripted, ("user", "Uno?"))
    expect(page.get_by_role("article", name="Answer")).to_have_count(1)


def test_text_of_model_and_user_is_never_html(page: Any, module_scripted: ScriptedEngine) -> None:
    says(module_scripted, HOSTILE)
    before = page.locator("script, img").count()
    ask(page, HOSTILE, answer=HOSTILE)
    assert page.get_by_role("article", name="Answer").locator(".text").evaluate("one => one.textContent") == HOSTILE
    assert page.get_by_role("article", name="Question").locator(".text").text_content() == HOSTILE
    assert page.locator("script, img").count() == before
    assert page.title() == f"Chat with {MODEL}"


def test_the_policy_refuses_inline_scripts_html_from_text_and_other_hosts(page: Any, url: str) -> None:
    policy = http().get(url).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    blocked = page.evaluate(
        """async () => {
        const html = await Promise.resolve().then(() => { document.body.innerHTML = "x"; }).catch((e) => e.name);
        const away = await fetch("http://localhost:9/").catch((e) => e.name);
        const script = Object.assign(document.createElement("style"), { textContent: "body { color: red }" });
        document.head.append(script);
        return [html, away, getComputedStyle(document.body).color];
        }"""
    )
    assert blocked[:2] == ["TypeError", "TypeError"]
    assert blocked[2] != "rgb(255, 0, 0)"


def test_everything_is_loaded_from_the_endpoint(context: Any, url: str) -> None:
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.get_by_role("heading", level=1)).to_have_text(MODEL)
    assert [one for one in asked if not one.startswith((url, "data:"))] == []
    assert f"{url}/page/chat.css" in asked


@pytest.mark.parametrize("button", ["Copy curl", "Copy Python"])
def test_what_is_copied_runs_and_sends_the_same_request(
    page: Any, module_scripted: ScriptedEngine, tmp_path: Path, button: str
) -> None:
    engine, question = module_scripted, "What's `this` $HOME \\ \"?\nJSON\nEOF"
    says(engine, "Fine $(exit) 'it' is")
    page.get_by_label("Add images").set_input_files(file("a.png", 8))
    ask(page, question, answer="Fine $(exit) 'it' is")
    page.get_by_role("button", name=button).click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    text = page.evaluate("navigator.clipboard.readText()")
    if button == "Copy curl":
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        command = ["bash", "-euc", text]
    else:
        command = [sys.executable, "-c", text]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    if button == "Copy curl":
        events = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
        out = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert out.strip() == "Fine $(exit) 'it' is"
    by_page, by_program = engine.asked[-2:]
    assert by_program[0].input_ids == by_page[0].input_ids
    assert by_program[0].images == by_page[0].images
    assert by_program[1] == by_page[1]


def test_a_key_is_asked_for_and_stays_in_the_tab(
    context: Any, versions: tuple[ModelVersion, ModelVersion], module_scripted: ScriptedEngine, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    secret = create_key(keys, "Ann", scopes=("chat",), lifetime=None, limits=KeyLimits())[1]
    says(module_scripted, "Hello")
    with endpoint(versions[0], module_scripted, access={"key_file": str(keys)}) as url:
        page = context.new_page()
        page.goto(url)
        expect(page.get_by_role("alert")).to_have_text("This endpoint asks for an API key.")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("This key is not valid here.")
        page.get_by_label("Key", exact=True).fill(secret)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text(MODEL)
        ask(page, "Hi", answer="Hello")
        page.get_by_role("button", name="Copy curl").click()
        expect(page.get_by_role("status")).to_have_text("Copied.")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "Bearer $VILA_API_KEY" in copied
        assert secret not in copied + page.url
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other = context.new_page()
        other.goto(url)
        expect(other.get_by_role("alert")).to_have_text("This endpoint asks for an API key.")


def test_a_failed_answer_says_so_and_its_question_can_be_asked_again(
    page: Any, module_scripted: ScriptedEngine
) -> None:
    says(module_scripted, "Yes")
    module_scripted.script = [RuntimeError("secret"), *module_scripted.script]
    page.get_by_role("textbox", name="Question").fill("Lost?")
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text("No complete answer: the server failed to answer")
    expect(answer).not_to_contain_text("secret")
    says(module_scripted, "Yes")
    ask(page, "Next?", answer="Yes")
    assert prompt_of(module_scripted).input_ids == ids(module_scripted, ("user", "Next?"))
    page.get_by_role("button", name="Ask again").first.click()
    expect(page.get_by_role("article", name="Question")).to_have_count(1)
    expect(page.get_by_role("status")).to_have_text("Answer: Yes")
    assert prompt_of(module_scripted).input_ids == ids(module_scripted, ("user", "Lost?"))


def test_answers_are_rated_where_the_endpoint_takes_feedback(
    context: Any,
    url: str,
    versions: tuple[ModelVersion, ModelVersion],
    module_scripted: ScriptedEngine,
    tmp_path: Path,
) -> None:
    says(module_scripted, "Six")
    page = opened(context, url)
    ask(page, "How many?", answer="Six")
    expect(page.get_by_role("group", name="Feedback")).to_be_hidden()
    place = tmp_path / "samples"
    with endpoint(versions[0], module_scripted, samples={"share": 1, "place": str(place)}) as keeping:
        page = opened(context, keeping)
        ask(page, "How many?", answer="Six")
        page.get_by_role("button", name="Bad").click()
        page.keyboard.type("Seven")
        page.get_by_role("button", name="Send feedback").click()
        expect(page.get_by_role("status")).to_have_text("Feedback sent.")
        expect(page.get_by_role("button", name="Bad")).to_have_attribute("aria-pressed", "true")
    [rating] = (place / "ratings").iterdir()
    said = json.loads(rating.read_text())
    assert (said["rating"], said["right_answer"]) == ("bad", "Seven")
    assert rating.name.startswith(said["id"])


def test_the_page_is_used_by_keyboard_alone_and_everything_has_a_name(
    page: Any, module_scripted: ScriptedEngine
) -> None:
    says(module_scripted, "Yes")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("Named?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Answer: Yes")
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.get_by_role("button", name="New chat").focus()
    wanted = ["API key", "Edit", "Ask again", "Copy text", "Copy curl", "Copy Python", "question", "files"]
    for name in [*wanted, "temperature", "Ask"]:
        page.keyboard.press("Tab")
        assert page.evaluate("(document.activeElement.innerText || document.activeElement.id).trim()") == name
    unnamed = "all => all.filter(one => one.checkVisibility() && !one.labels?.length && !one.innerText.trim() && "
    unnamed += "!one.ariaLabel).map(one => one.outerHTML)"
    assert page.locator("button, input, textarea, select").evaluate_all(unnamed) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_either_colour_scheme(
    browser: Any, url: str, module_scripted: ScriptedEngine, scheme: str
) -> None:
    says(module_scripted, "A" * 30 + " long answer")
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = opened(context, url)
    page.get_by_label("Add images").set_input_files([file("a.png", 60), file("b.png", 60), file("c.png", 60)])
    ask(page, "w" * 200, answer="A" * 30 + " long answer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("Ask", "Copy Python", "Ask again"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
        assert box["height"] >= 40
    edges = [page.locator(one).bounding_box() for one in (".box", "#send")]
    assert edges[1]["x"] + edges[1]["width"] < edges[0]["x"] + edges[0]["width"] - 5
    for selector in ("body", ".soft", ".answer .text", ".question .text", ".facts dt", ".actions .plain", "#send"):
        assert contrast(page, selector) >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.2) == (scheme == "dark")
    context.close()


def contrast(page: Any, selector: str) -> float:
    """WCAG 2.2's contrast ratio of an element's text and the background that it is drawn on."""
    colours = page.locator(selector).first.evaluate(
        """(one) => { let shown = one;
        while (getComputedStyle(shown).backgroundColor === "rgba(0, 0, 0, 0)") shown = shown.parentElement;
        return [getComputedStyle(one).color, getComputedStyle(shown).backgroundColor]; }"""
    )
    darker, lighter = sorted(luminance(colour) for colour in colours)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of `rgb(R, G, B)`."""
    channels = [int(one) / 255 for one in colour[4:-1].split(",")]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
