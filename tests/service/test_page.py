"""The page, in Chromium: a person's way from photos to pictures, by mouse and by keyboard, small and in the dark."""

import io
import json
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from catversion_jax.methods import concept_file
from tests.commands import catversion
from tests.service.servers import CONCEPTS, Running, ended, learn, running

WAIT = 120_000  # milliseconds
TEAPOT = sorted(map(str, (CONCEPTS / "teapot" / "train").glob("*.png")))
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Debian's, or the one that Playwright has installed.
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, server: Running, request) -> Iterator[Page]:
    """A page that may ask this server alone, and that has no error at the end."""
    context = browser.new_context(**getattr(request, "param", {}))
    made = context.new_page()
    asked, errors = [], []
    made.on("request", lambda request: asked.append(request.url))
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("dialog", lambda dialog: dialog.accept())
    made.goto(server.address)
    made.set_default_timeout(WAIT)
    yield made
    context.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((f"{server.address}/", "blob:", "data:"))]


def choose_photos(page: Page, count: int = 5) -> None:
    page.set_input_files("#files", TEAPOT[:count])
    expect(page.locator("#photos img")).to_have_count(count)


def learn_by(page: Page, submit: Callable[[], None]) -> Locator:
    """Returns the card of the concept that `submit` sends: the server may have others, learned before."""
    with page.expect_response(
        lambda answer: answer.request.method == "POST" and answer.url.endswith("/v1/concepts")
    ) as sent:
        submit()
    return page.locator(f"#concept-{sent.value.json()['id']}")


def test_from_photos_to_pictures(page: Page, server: Running, tmp_path):
    choose_photos(page)
    expect(page.locator("#photo-hint")).to_have_text("5 photos, as training will see them.")
    page.fill("#class-word", "teapot")
    card = learn_by(page, lambda: page.click("#learn-button"))
    expect(card.locator("h3")).to_have_text("teapot")
    expect(card.locator(".state")).to_contain_text("done")
    expect(card.locator("svg.curve")).to_be_visible()
    expect(card.get_by_label("Previews").locator("img")).to_have_count(4)
    expect(card.get_by_label("The photos").locator("img")).to_have_count(5)
    expect(page.locator("#photos img")).to_have_count(0)  # taken
    card.get_by_text("Draw with it").click()
    page.fill("#prompt", "a photo of a teapot in the snow")
    page.select_option("#concept-b", "base")
    page.fill("#first-seed", "7")
    page.fill("#count", "2")
    page.locator("#strength").fill("1.5")
    page.click("#draw-button")
    drawn = page.locator(".drawn").first
    expect(drawn.locator(".pictures img")).to_have_count(4)
    expect(drawn.locator("h4")).to_have_text(["teapot, strength 1.5", "the base model"])
    for image in drawn.locator(".pictures img").all():
        expect(image).to_have_js_property("naturalWidth", 16)
    drawn.locator(".pictures button").first.click()
    expect(page.locator("#large-image")).to_be_visible()
    with page.expect_download() as download:
        page.click("#large-save")
    record = json.loads(Image.open(download.value.path()).info["catversion"])
    assert (record["prompt"], record["seed"]) == ("a photo of a teapot in the snow", 7)
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()
    with page.expect_download() as download:
        card.get_by_text("Save the concept").click()
    download.value.save_as(tmp_path / "concept.safetensors")
    assert concept_file.load(tmp_path / "concept.safetensors").class_word == "teapot"
    with page.expect_download() as download:
        card.get_by_text("diffusers and ComfyUI").click()
    assert download.value.suggested_filename == "export.zip"
    count = page.locator(".concept").count()
    card.get_by_text("Remove it").click()
    expect(page.locator(".concept")).to_have_count(count - 1)


def test_by_keyboard(page: Page, server: Running):
    """Every step is reached by Tab, and what has the focus shows it."""
    choose_photos(page, 3)

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                style = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert style != "none", selector
                return
        raise AssertionError(f"{selector}: not reached")

    page.locator("#files").focus()
    tab_to("#class-word")
    page.keyboard.type("teapot")
    card = learn_by(page, lambda: page.keyboard.press("Enter"))
    expect(card).to_be_focused()
    expect(card.locator(".state")).to_contain_text("done")
    tab_to('[data-does="draw"]')
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    tab_to("#count")
    page.keyboard.press("Control+A")
    page.keyboard.type("1")
    tab_to("#draw-button")
    page.keyboard.press("Space")
    expect(page.locator(".drawn .pictures img")).to_have_count(1)
    tab_to(".pictures button")
    page.keyboard.press("Enter")
    expect(page.locator("#large")).to_be_visible()
    page.keyboard.press("Escape")


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True)
def test_on_a_phone(page: Page, server: Running, teapot):
    """Nothing is wider than the screen, and what is touched is large enough."""
    choose_photos(page)
    expect(page.locator(".concept").first).to_be_visible()
    page.select_option("#concept-a", teapot["id"])
    page.select_option("#concept-b", "base")
    page.fill("#count", "2")
    page.click("#draw-button")
    expect(page.locator(".drawn .pictures img")).to_have_count(4)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    for button in page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 24


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_in_the_dark(page: Page, server: Running):
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert np.median(shot) < 60
    assert (shot > 180).mean() > 0.002  # the text


def test_warnings_and_mistakes(page: Page, server: Running, tmp_path):
    """The same photo twice, a file that is no photo, no photos, a class word that cannot be."""
    page.click("#learn-button")  # the browser asks for the class word
    page.fill("#class-word", "teapot")
    page.click("#learn-button")
    expect(page.locator("#learn-error")).to_have_text("Choose the photos first.")
    page.set_input_files("#files", [TEAPOT[0], TEAPOT[0]])
    expect(page.locator("#photos .warning")).to_have_text(["nearly the same as 000"])
    (tmp_path / "a.png").write_bytes(b"no photo")
    page.set_input_files("#files", [str(tmp_path / "a.png")])
    expect(page.locator("#photo-hint")).to_contain_text("not a JPEG, PNG, WEBP, HEIC or AVIF image")
    page.get_by_label("Remove photo 3").click()
    expect(page.locator("#photo-hint")).to_contain_text("2 photos")
    page.fill("#class-word", "tea{pot}")
    page.click("#learn-button")
    expect(page.locator("#learn-error")).to_contain_text("expected the base class")


def test_nothing_of_a_client_becomes_html(page: Page, server: Running):
    word = "<img src=x onerror=alert`1`>"
    concept = learn(server.client, steps="1", class_word=word)
    page.reload()
    expect(page.locator(f"#concept-{concept['id']} h3")).to_have_text(word)
    ended(server.client, concept["id"], previews=False)
    assert page.locator("h3 img").count() == 0
    page.fill("#prompt", "<b>bold</b> teapot")
    page.fill("#count", "1")
    page.click("#draw-button")
    expect(page.locator(".drawn p").first).to_have_text("<b>bold</b> teapot")
    assert server.client.delete(f"/v1/concepts/{concept['id']}").status_code == 204


def test_with_a_token(browser: Browser, tiny_model, tmp_path):
    """The page asks for it, keeps it for its tab, and shows pictures that need it."""
    token = catversion("token", "anna", f"--tokens={tmp_path / 'tokens'}").stdout.strip()
    with running(tmp_path / "store", tiny_model, f"--tokens={tmp_path / 'tokens'}") as server:
        concept = ended(server.client_of(token), learn(server.client_of(token))["id"])
        page = browser.new_page()
        page.goto(server.address)
        page.fill("#token", "cv_wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#token-form")).to_be_visible()
        page.fill("#token", token)
        page.keyboard.press("Enter")
        card = page.locator(f"#concept-{concept['id']}")
        for image in card.locator("img").all():
            expect(image).to_have_js_property("complete", True)
            expect(image).to_have_js_property("naturalWidth", 16)
        assert token not in page.content()
        page.close()
