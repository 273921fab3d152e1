"""How long the pipeline takes when records are fresh and everything else is made anew: pages, scores, book.

    python bench/book.py

Wall-clock seconds of `dvc repro --force`; the target is under six minutes.
"""

import subprocess
import time

from report import save

from fedlib.data.sources import home


def main() -> None:
    begin = time.perf_counter()
    subprocess.run(["dvc", "repro", "--force"], cwd=home(), check=True)
    seconds = time.perf_counter() - begin
    print(f"pipeline with fresh records: {seconds:.0f} s; target 360 s")
    save("book", {"seconds": round(seconds, 1)}, ("jupyter-book", "dvc"))


if __name__ == "__main__":
    main()
