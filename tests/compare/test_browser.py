"""The report page in a real browser: its script runs without an error, sorts, slides, and obeys the keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bidensify.compare.images import png
from bidensify.compare.plots import Panel, curves
from bidensify.compare.report import Report, Shot, Table, Viewer, write_report

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
NASTY = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no chromium with its chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1600",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    # A machine that is busy with other things may take minutes for a click.
    driver.command_executor.client_config.timeout = 600
    yield driver
    driver.quit()


def picture(red: int) -> bytes:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[0] = red
    return png(image)


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    names = ["input", "ground truth", "float", NASTY]
    shots = [
        Shot(
            f"image {number}</script>",
            {name: picture(40 * number + 10 * place) for place, name in enumerate(names)},
            {"float": picture(200), NASTY: picture(210)},
        )
        for number in range(3)
    ]
    rows = [["b", "71.25 ± 0.50", "1,200"], ["a", "9.50", "800"], [NASTY, "–", "30"], ["C", "100.00", "4,000"]]
    table = Table("Methods", ["method", "mIoU %", "bytes"], rows, sortable=True)
    figure = curves("Curves", [Panel("p", "epoch", "y", {"s": [(1, 0.5), (2, 0.7)]})])
    viewer = Viewer("Viewer", names, shots, first=("ground truth", "float"))
    report = Report(NASTY, NASTY, sections=[table, viewer, figure])
    path = write_report(report, tmp_path_factory.mktemp("page") / "report.html")
    browser.get(Path(path).as_uri())
    return browser


def js(page: Any, code: str) -> Any:
    return page.execute_script(f"return {code}")


def column(page: Any, number: int) -> list[str]:
    return list(js(page, f"[...document.querySelectorAll('tbody tr')].map(r => r.cells[{number}].textContent.trim())"))


def test_sorting(page: Any) -> None:
    from selenium.webdriver.common.by import By

    buttons = page.find_elements(By.CSS_SELECTOR, "th button")
    assert len(buttons) == 3
    buttons[1].click()
    assert column(page, 1) == ["100.00", "71.25 ± 0.50", "9.50", "–"]
    buttons[1].click()
    assert column(page, 1) == ["9.50", "71.25 ± 0.50", "100.00", "–"]
    buttons[2].click()
    assert column(page, 2) == ["4,000", "1,200", "800", "30"]
    buttons[0].send_keys("\n")  # by keyboard
    assert column(page, 0)[1:] == ["a", "b", "C"]
    assert js(page, "[...document.querySelectorAll('th')].map(c => c.ariaSort)") == ["ascending", None, None]


def test_slider_and_keyboard(page: Any) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    stage = page.find_element(By.CSS_SELECTOR, ".stage")

    def split() -> float:
        return float(
            js(page, "getComputedStyle(document.querySelector('.stage')).getPropertyValue('--split')").strip(" %")
        )

    def sources() -> tuple[str, str]:
        return js(page, "['over', 'under'].map(n => document.querySelector('.' + n).src)")  # type: ignore[no-any-return]

    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    assert split() == 50
    width = stage.size["width"]
    ActionChains(page).move_to_element_with_offset(stage, -width // 4, 0).click().perform()
    assert split() == pytest.approx(25, abs=1)
    drag = ActionChains(page).move_to_element_with_offset(stage, -width // 4, 0).click_and_hold()
    drag.move_by_offset(width // 2, 0).release().move_by_offset(-width // 8, 0).perform()
    assert split() == pytest.approx(75, abs=1)
    clip = js(page, "getComputedStyle(document.querySelector('.over')).clipPath")
    assert "25" in clip or f"{width / 4:.0f}" in clip
    # Both pictures lie on the same pixels.
    boxes = js(
        page, "['over', 'under'].map(n => JSON.stringify(document.querySelector('.' + n).getBoundingClientRect()))"
    )
    assert boxes[0] == boxes[1]
    assert stage.size["width"] / stage.size["height"] == pytest.approx(2, rel=0.02)

    stage.send_keys(Keys.HOME)
    assert split() == 0
    stage.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert split() == 4
    assert stage.get_attribute("aria-valuenow") == "4"
    first = sources()
    stage.send_keys(Keys.ARROW_DOWN)
    assert sources() != first
    assert "2 of 3" in page.find_element(By.CSS_SELECTOR, ".caption").text
    stage.send_keys(Keys.ARROW_UP)
    assert sources() == first
    stage.send_keys("]")
    assert sources()[1] != first[1]
    assert page.find_element(By.CSS_SELECTOR, ".tag.right").text == NASTY
    stage.send_keys("[")
    stage.send_keys("e")
    assert sources()[0] == first[0]  # the ground truth is not wrong anywhere
    assert sources()[1] != first[1]
    assert page.find_element(By.CSS_SELECTOR, ".tag.right").text == "float: wrong in red"
    page.find_element(By.CSS_SELECTOR, ".pick-errors").click()
    assert sources() == first
    page.find_elements(By.CSS_SELECTOR, ".strip button")[2].click()
    assert "3 of 3" in page.find_element(By.CSS_SELECTOR, ".caption").text


def test_light_and_dark(page: Any) -> None:
    from selenium.webdriver.common.by import By

    def ground() -> str:
        return page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")  # type: ignore[no-any-return]

    def shown() -> list[bool]:
        images = page.find_elements(By.CSS_SELECTOR, ".plot img")
        return [image.value_of_css_property("display") != "none" for image in images]

    before = ground(), shown()
    page.find_element(By.ID, "theme").click()
    after = ground(), shown()
    assert before[0] != after[0]
    assert sorted(before[1]) == sorted(after[1]) == [False, True]
    assert before[1] != after[1]
    page.find_element(By.ID, "theme").click()
    assert (ground(), shown()) == before


def test_names_are_text_and_the_console_is_quiet(page: Any) -> None:
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert page.title == NASTY
    assert js(page, "document.querySelectorAll('img[onerror]').length") == 0
    entries = page.get_log("browser")
    # The one script that this test put in is refused by the page's own policy; nothing else is said.
    assert len(entries) == 1, entries
    assert "Content Security Policy" in entries[0]["message"]
