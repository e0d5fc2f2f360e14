"""The report holds all it shows, asks nobody for anything, and says what it leaves out."""

import html.parser
import json
import os
import pathlib
import re
import shutil
import tempfile

import ml_collections
import pytest
from PIL import Image

from advprop_jax.errors import InputError
from advprop_jax.report import report
from tests.figures.test_robustness import corruptions, strengths
from tests.figures.test_runs import row, workdir

SMALLEST_TEXT = 12      # CSS pixels


def make(first, *others):
  runs = ", ".join(map(str, others)) or None
  return report(ml_collections.ConfigDict({"report": {"runs": runs}}), str(first))


def measured(folder, shift):
  """Adds an evaluation on corrupted images and by strength to a run's results."""
  path = pathlib.Path(folder, "summary.json")
  summary = json.loads(path.read_text())
  summary["results"]["corruptions"] = row(0.63 - shift, benchmark="corruptions")
  summary["details"] = {"corruptions": corruptions(shift),
                        "strength": strengths({1: 0.6 - shift, 2: 0.5 - shift})}
  summary["skipped"] = {"imagenet_a": f"looked for in {folder}/imagenet-a <b>"}
  path.write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory):
  """(result, folder) of a report of a trained run, and of its main half as if it were vanilla."""
  root = tmp_path_factory.mktemp("pair")
  for name in ("ours", "theirs"):
    shutil.copytree(run[1], root / name, ignore=shutil.ignore_patterns("evaluation*"))
  for file in ("config.json", "summary.json"):
    path = root / "theirs" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheme": "vanilla"}))
  measured(root / "ours", 0.0)
  measured(root / "theirs", 0.1)
  return make(root / "ours", root / "theirs"), root / "ours" / "report"


class Images(html.parser.HTMLParser):
  """All that a page would load."""

  def __init__(self, text):
    super().__init__()
    self.sources, self.alts, self.tags = [], [], set()
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.add(tag)
    self.sources += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
    if tag == "img":
      self.alts.append(attrs.get("alt"))


def test_the_page_holds_everything(pair):
  """Fails where a figure is no file, a file no figure, or the page names anything outside."""
  result, folder = pair
  text = (folder / "index.html").read_text(encoding="utf-8")
  page = Images(text)
  assert all(source.startswith("data:") for source in page.sources)
  assert not page.tags & {"script", "iframe", "object", "embed", "video", "base"}
  assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"data:image/png;base64,[^\"]*", "",
                                                               text))
  assert all(page.alts)
  assert result["left_out"] == {}
  assert sorted(path.name for path in folder.iterdir()) == sorted([*result["figures"],
                                                                   "index.html"])
  assert len(set(result["figures"])) == len(result["figures"]) >= 20
  for name in result["figures"]:
    with Image.open(folder / name) as image:
      assert image.size[0] >= 900
  # All but the two sheets, whose images are there one by one.
  embedded = [source for source in page.sources if source.startswith("data:image/png")]
  assert len(embedded) == len(result["figures"]) - 2 + 8 * (2 + 2 * 2) + 8 * (1 + 2)


def test_the_page_says_what_the_files_say(pair):
  """Fails where a number, a run, what was skipped or the command is missing or another."""
  _, folder = pair
  text = (folder / "index.html").read_text(encoding="utf-8")
  summary = json.loads((folder.parent / "summary.json").read_text())
  for expected in (f"{100 * summary['results']['clean']['top1']:.2f}", "63.00 ±", "53.00 ±",
                   "ours", "theirs", "one_block", "imagenet_a",
                   "<span>--config.report.runs=theirs</span>", "37.00 ± 0.40"):
    assert expected in text


def test_the_page_tells_nothing_of_the_machine(pair):
  """Fails where a folder stands in it, or text of a file becomes HTML."""
  _, folder = pair
  text = (folder / "index.html").read_text(encoding="utf-8")
  text = re.sub(r"data:image/png;base64,[^\"]*", "", text)
  assert str(folder.parents[1]) not in text
  assert tempfile.gettempdir() + "/" not in text
  assert os.path.expanduser("~") + "/" not in text
  assert "imagenet-a &lt;b&gt;" in text


def test_what_cannot_be_made_is_left_out(tmp_path):
  """Fails where a run without log, checkpoint or pair ends in a traceback, or without reasons."""
  path = workdir(tmp_path / "alone")
  result = make(path)
  assert result["figures"] == []
  assert len(result["left_out"]) == 7
  text = pathlib.Path(result["page"]).read_text(encoding="utf-8")
  assert text.count('class="missing"') == 7
  assert str(tmp_path) not in text
  assert "alone: there is no checkpoint in" in text


def test_bad_input(tmp_path):
  """Fails where a bad workdir, or a report that cannot be written, ends in a traceback."""
  path = workdir(tmp_path / "a")
  with pytest.raises(InputError, match=r"config\.report\.runs.*no such folder"):
    make(path, tmp_path / "nowhere")
  with pytest.raises(InputError, match=r"--workdir=.*no run"):
    make(tmp_path)
  pathlib.Path(path, "report").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    make(path)


@pytest.fixture
def browser():
  """A function (width) -> a real browser without a window, with a log of its requests."""
  webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
  service = pytest.importorskip("selenium.webdriver.chrome.service")
  chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
  if not (chromium and driver):
    pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
  opened = []

  def open_browser(width, profile):
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking",
                 "disable-component-update", "disable-sync", "no-first-run",
                 f"user-data-dir={profile}"):
      options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened.append(webdriver.Chrome(options=options, service=service.Service(driver)))
    opened[-1].execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    return opened[-1]

  yield open_browser
  for each in opened:
    each.quit()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(pair, browser, tmp_path, width):
  """Fails where a request leaves the page, an image is broken, text is tiny, or it moves aside."""
  _, folder = pair
  page = browser(width, tmp_path / "profile")
  url = (folder / "index.html").as_uri()
  page.get("about:blank")
  page.get_log("performance")           # of the browser's own first page
  page.get(url)
  events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
  requests = {event["params"]["request"]["url"] for event in events
              if event["method"] == "Network.requestWillBeSent"}
  assert {request for request in requests if not request.startswith("data:")} == {url}
  images = page.execute_script(
      "return [...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.alt])")
  assert len(images) > 50
  assert all(complete and natural > 0 and shown > 60 and alt
             for complete, natural, shown, alt in images)
  assert page.execute_script("return document.documentElement.scrollWidth") <= width
  smallest = page.execute_script("""
      const sizes = [...document.querySelectorAll('body *')]
          .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
          .map(e => parseFloat(getComputedStyle(e).fontSize));
      return Math.min(...sizes)""")
  assert smallest >= SMALLEST_TEXT
