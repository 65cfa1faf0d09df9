"""Pictures of a run's real report as a reader sees it: at two widths, in light and in dark.

And the README's: the two sections that say what a cleaning run is for.

    bilevel-flax train --config configs/mnist_hypercleaning.py:structured --workdir runs/clean
    python docs/_scripts/screenshots.py runs/clean [--out docs/_static]

Needs Chromium or Chrome, which runs without a window and without a network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = {"phone": 390, "desktop": 1200}
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers
README = ("Test error against the baselines", "Most suspicious examples")
README_SIZE = (1040, 1300)


def main() -> None:
    """Writes `report-WIDTH-SCHEME.png`, four of them, and `hypercleaning.png`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "_static")
    parser.add_argument("--height", type=int, default=1500, help="of the picture, in pixels")
    options = parser.parse_args()
    report = options.run.resolve() / "report.html"
    if not report.is_file():
        raise SystemExit(f"{report}: no such report; `bilevel-flax report {options.run}` makes it")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    options.out.mkdir(parents=True, exist_ok=True)
    for device, width in WIDTHS.items():
        for scheme, number in SCHEMES.items():
            path = options.out / f"report-{device}-{scheme}.png"
            take(browser, report, path, (width, options.height), number)
            print(path)
    with tempfile.TemporaryDirectory() as folder:
        page, path = Path(folder) / "report.html", options.out / "hypercleaning.png"
        page.write_text(only(report.read_text(), README))
        take(browser, page, path, README_SIZE, SCHEMES["light"])
        print(path)


def only(report: str, titles: tuple[str, ...]) -> str:
    """The report with these sections and nothing else."""
    head, *sections = report.split("<section>")
    kept = [part for part in sections if part.startswith(tuple(f"<h2>{t}" for t in titles))]
    if len(kept) != len(titles):
        raise SystemExit(f"the report has not all of the sections {', '.join(titles)}")
    begin = head.partition("<main>")[0] + "<main>"
    return begin + "".join(f"<section>{part.partition('</section>')[0]}</section>" for part in kept)


def take(browser: str, report: Path, path: Path, size: tuple[int, int], scheme: int) -> None:
    """One picture. A browser's own window is never as narrow as a phone, a frame in it is."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "frame.html"
        page.write_text(
            "<!DOCTYPE html><body style='margin:0'>"
            f"<iframe src='{report.as_uri()}' width='{width}' height='{height}' "
            "style='border:0;display:block'></iframe>"
        )
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--screenshot={path}"]
        command += [f"--blink-settings=preferredColorScheme={scheme}"]
        command += [f"--window-size={max(width, 500)},{height}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    crop(path, width)


def crop(path: Path, width: int) -> None:
    """Cuts off what the window is wider than the frame."""
    from PIL import Image

    with Image.open(path) as image:
        cut = image.convert("RGB").crop((0, 0, width, image.height)).quantize(128)
    cut.save(path, optimize=True)


if __name__ == "__main__":
    main()
