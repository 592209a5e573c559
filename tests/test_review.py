"""The page in which a person decides about suspects, in a real browser, and the influence that it shows."""

import base64
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ANALYZE, DETECT, TRAIN, digits, read_table, result_folder, succeed
from PIL import Image
from safetensors.torch import load_file
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import detect_mislabeled_dataset as detect
import pipeline

CHROMIUM, DRIVER = map(shutil.which, ("chromium", "chromedriver"))
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)
NAMES, PAGE = ["<b>\"'&", "a, b; c", "owl"], "suspects_identity.html"
DATA = (
    "--dataset",
    "imagefolder",
    "--dataset_dir",
    "photos",
    "--device",
    "cpu",
    "--precision",
    "fp32",
)
TRAINING = (TRAIN, *DATA, "--train_batch_size", 8, "--num_train_epochs", 1)
DETECTION = (DETECT, *DATA, "--corrupt_percentage", 0, "--factor_strategy", "identity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of 24 images in three class folders, whose names are markup, and with its page."""
    root, random = tmp_path_factory.mktemp("review"), np.random.default_rng(0)
    for place in (root / "photos" / split / name for split in ("train", "test") for name in NAMES):
        place.mkdir(parents=True)
        for i in range(8 if "train" in place.parts else 2):
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"<img src=x onerror='alert({i})'>, \"{i}.png")
    succeed(root, *TRAINING)
    assert f"{PAGE} in a browser, decide, and save corrections.csv here" in succeed(
        root, *DETECTION
    )
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, which saves files in its folder `downloads`."""
    options, home = webdriver.ChromeOptions(), tmp_path_factory.mktemp("browser")
    options.binary_location = CHROMIUM
    quiet = (
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
    for flag in ("headless=new", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={home}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(home / "downloads")}
    )
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.downloads = home / "downloads"
    yield driver
    driver.quit()


def open_page(browser, path):
    """Opens a page about which nothing was decided. Returns what it was told of its cards."""
    browser.get(path.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    return json.loads(browser.find_element("id", "data").get_attribute("textContent"))["cards"]


def decide(browser, card, how, name=""):
    """Decides about a card by a key or, where `how` is longer, by its button of that text; types a name behind it."""
    if len(how) > 1:
        browser.find_element("xpath", f"//article[{card['rank']}]//button[.='{how}']").click()
    ActionChains(browser).send_keys(
        *[how] * (len(how) == 1), *[name, Keys.ENTER] * bool(name)
    ).perform()


def texts(browser, selector):
    """The texts of the elements that are in view."""
    return [
        element.text
        for element in browser.find_elements("css selector", selector)
        if element.is_displayed()
    ]


def save_and_train(browser, folder):
    """Saves the file and trains with it. Returns its rows, and what was decided by path: a class, or "" (left out)."""
    path = browser.downloads / "corrections.csv"
    path.unlink(missing_ok=True)
    browser.find_element("css selector", "[value=save]").click()
    WebDriverWait(browser, 10).until(lambda _: path.exists())
    succeed(folder, *TRAINING, "--corrections", path)
    cleaning = pipeline.load_checkpoint(folder / "checkpoints/model_cleaned.pth")[1]["cleaning"]
    paths = pipeline.load_data("imagefolder", folder / "photos", "train").paths
    found = {i: NAMES[label] for i, label in cleaning["new_labels"].items()} | dict.fromkeys(
        cleaning["excluded"], ""
    )
    rows = [[*row.values()] for row in read_table(path)[1]]
    return rows, {paths[i].removeprefix(f"{folder}/"): name for i, name in found.items()}


@in_browser
def test_decisions_survive_a_reload_and_reach_the_model(browser, folder):
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    ways = [Keys.ENTER, "a", "k", "x", "2", "c", "Accept", "Keep", "Leave out", "Other…"]
    names = [
        cards[0]["suggested"],
        cards[1]["suggested"],
        cards[2]["label"],
        "",
        NAMES[1],
        NAMES[0],
    ]
    names += [cards[6]["suggested"], cards[7]["label"], "", NAMES[2]]
    for card, how, name in zip(cards, ways, names, strict=False):
        decide(browser, card, how, name if how in ("c", "Other…") else "")
    for key in "xu":
        decide(browser, cards[10], key)
    browser.refresh()
    new = {
        card["key"]: name for card, name in zip(cards, names, strict=False) if name != card["label"]
    }
    states = [new.get(card["key"], "kept") for card in cards[:10]]
    states = [
        "left out" if state == "" else state if state == "kept" else f"→ {state}"
        for state in states
    ]
    assert texts(browser, "h2") == [
        f"{i}. {state}" for i, state in enumerate(states + ["undecided"] * 14, start=1)
    ]
    assert texts(browser, "#counts") == [f"10 of 24 decided, {len(new) - 2} changed, 2 left out"]
    browser.find_element("id", "undecided").click()
    assert len(texts(browser, "h2")) == 14
    pairs = [f"{card['label']} → {card['suggested']}" for card in cards]
    next(
        option for option in browser.find_elements("tag name", "option") if option.text == pairs[12]
    ).click()
    assert len(texts(browser, "h2")) == pairs[10:].count(pairs[12]) < 14
    rows, decided = save_and_train(browser, folder)
    assert decided == new and rows == [
        [c["key"], c["label"], new[c["key"]]] for c in cards if c["key"] in new
    ]


@in_browser
def test_a_second_round_goes_on_with_the_file_of_the_first(browser, folder):
    """As a spreadsheet writes it. The page then has the labels after cleaning, of which none may be lost."""
    path, cards = (
        folder / "corrections.csv",
        open_page(browser, result_folder(folder, "model-") / PAGE),
    )
    first = {cards[0]["key"]: cards[0]["suggested"], cards[1]["key"]: ""}
    quoted = [
        '"{}";"{}"'.format(*(cell.replace('"', '""') for cell in row)) for row in first.items()
    ]
    path.write_text(
        "\n".join(["path;new_label", *quoted, ";"]), encoding="utf-8-sig", newline="\r\n"
    )
    succeed(folder, *TRAINING, "--corrections", path)
    succeed(folder, *DETECTION, "--cleaned")
    cards = open_page(browser, result_folder(folder, "model_cleaned-") / PAGE)
    assert "load your earlier corrections.csv first" in texts(browser, "header")[0]
    browser.find_element("id", "file").send_keys(str(path))
    WebDriverWait(browser, 10).until(
        lambda _: texts(browser, "#notice") == ["Loaded 2 rows; decided cards: 1."]
    )
    new = next(card for card in cards if card["key"] not in first)
    decide(browser, new, "Leave out")
    expected = first | {new["key"]: ""}
    assert save_and_train(browser, folder) == (
        [[key, "", name] for key, name in expected.items()],
        expected,
    )


@in_browser
@pytest.mark.parametrize(
    "text", ["path,new_label\nx.png,cat", "path,label\nx.png,owl", "file,new_label\nx.png,owl"]
)
def test_a_file_that_does_not_fit_is_refused(browser, folder, tmp_path, text):
    open_page(browser, result_folder(folder, "model-") / PAGE)
    (tmp_path / "corrections.csv").write_text(text)
    browser.find_element("id", "file").send_keys(str(tmp_path / "corrections.csv"))
    WebDriverWait(browser, 10).until(
        lambda _: "".join(texts(browser, "#notice")).startswith("Nothing was loaded")
    )
    assert texts(browser, "#counts") == ["0 of 24 decided, 0 changed, 0 left out"]


@in_browser
def test_names_do_nothing_and_nothing_is_requested(browser, folder, tmp_path):
    """Also names of classes that no folder can have."""
    browser.get_log("performance")
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    assert texts(browser, ".facts b") == [
        name for card in cards for name in (card["label"], card["suggested"])
    ]
    links = browser.find_elements("css selector", "article a")
    files = [(card["name"], (folder / card["key"]).as_uri()) for card in cards]
    assert [(link.text, link.get_attribute("href")) for link in links] == files
    names = ["</script><script>alert(1)</script>", "{{data}}<!--<script>"]
    data = replace(digits(6), labels=torch.arange(6) % 2, class_names=names)
    about = {"num_review": 500, "by": "loss", "cleaned": False}
    detect.write_page(
        tmp_path / PAGE, data, np.arange(6), np.zeros(6), torch.eye(2)[data.labels], {}, **about
    )
    open_page(browser, tmp_path / PAGE)
    assert texts(browser, ".facts b") == [*names, *names[::-1]] * 3
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith(("file:///", "data:")) for url in urls)


def test_a_card_has_its_image_and_the_best_class_beside_its_label_and_no_name_ends_the_data(
    tmp_path,
):
    """Another ranking, and other paths, have another fingerprint, under which the browser keeps what is decided."""
    names, order = (
        ["</script><script>alert(1)</script>", "{{data}}<!--<script>", "owl"],
        np.array([3, 0, 4, 2, 1]),
    )
    data = replace(digits(5), labels=torch.tensor([0, 1, 2, 0, 1]), class_names=names)
    logits = torch.tensor([[5.0, 1, 3], [5, 1, 3], [5, 1, 3], [0, 4, 2], [2, 4, 6]])
    about, pages = {"num_review": 5, "by": "loss", "cleaned": False}, []
    for shown, scores in ((data, 0), (data, 1), (replace(data, paths=["a"] * 5), 0)):
        detect.write_page(tmp_path / PAGE, shown, order, np.full(5, scores), logits, {}, **about)
        pages.append((tmp_path / PAGE).read_text(encoding="utf-8"))
    told = [page.partition('id="data">')[2].partition("</script>")[0] for page in pages]
    assert "<" not in told[0] and "alert" not in pages[0].replace(told[0], "")
    assert len({json.loads(facts)["fingerprint"] for facts in told}) == 3
    cards = json.loads(told[0])["cards"]
    assert [card["suggested"] for card in cards] == [names[label] for label in (1, 2, 2, 0, 0)]
    sprite = Image.open(
        io.BytesIO(base64.b64decode(pages[0].partition("base64,")[2].partition('"')[0]))
    )
    for card, position in zip(cards, order.tolist(), strict=True):
        row, column = divmod(card["image"], sprite.width // 32)
        tile = np.asarray(
            sprite.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        ).astype(int)
        assert np.abs(tile - data.images[position].permute(1, 2, 0).numpy()).mean() < 12


def test_explanations_are_the_influence_on_the_same_images_in_the_test(folder, tmp_path):
    """Those of all images, since fewer are there than asked for, and each without its influence on itself."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    diagonal = ("--factor_strategy", "diagonal", "--factor_examples", "all")
    assert "/explanations_diagonal.csv\n" in succeed(
        tmp_path, *DETECTION, *diagonal, "--explain", 100
    )
    shutil.rmtree(tmp_path / "photos/test")
    shutil.copytree(
        tmp_path / "photos/train", tmp_path / "photos/test"
    )  # images of both are in one order
    succeed(tmp_path, ANALYZE, *DATA, *diagonal, "--damping_factor", "heuristic")
    results = result_folder(tmp_path, "model-")
    path = max(results.glob("scores_pairwise_diagonal*"), key=lambda path: path.stat().st_mtime)
    influence = load_file(path / "pairwise_scores.safetensors")["all_modules"].fill_diagonal_(0)
    header, rows = read_table(results / "explanations_diagonal.csv")
    assert header == ["suspect", "rank", "image", "label", "score"]
    labels = [
        NAMES[label]
        for label in pipeline.load_data("imagefolder", tmp_path / "photos", "train").labels
    ]
    close = {"abs": 1e-6 * influence.abs().max().item()}
    for suspect, scores in enumerate(influence):
        found = [row for row in rows if row["suspect"] == str(suspect)]
        low, high = scores.sort().values[:3], scores.sort(descending=True).values[:3]
        expected = torch.cat([low[low < 0], high[high > 0]]).tolist()
        assert [float(row["score"]) for row in found] == pytest.approx(expected, **close)
        assert scores[[int(row["image"]) for row in found]].tolist() == pytest.approx(
            expected, **close
        )
        assert [row["rank"] for row in found] == [
            *"123"[: (low < 0).sum()],
            *"123"[: (high > 0).sum()],
        ]
        assert [row["label"] for row in found] == [labels[int(row["image"])] for row in found]

    written = [results / "suspects_diagonal.html", results / "explanations_diagonal.csv"]
    assert all(path.exists() for path in written)
    assert written[0].name not in succeed(tmp_path, *DETECTION, *diagonal, "--num_review", 0)
    assert not any(path.exists() for path in written), "none must be left from an earlier run"
