"""What is fetched is there whole or not at all, and is fetched by one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# A process whose internet is two zips, of the small tagger and of Punkt; a slow one drips them.
FETCH = """
import hashlib, io, pathlib, sys, time, zipfile
import nltk.downloader
slow, bodies, packages = sys.argv[1] == "slow", {}, ""
for package in ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng"):
    subdir, name = package.split("/")
    folder, body = pathlib.Path("tests/nltk_data", subdir), io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in sorted(folder.glob(f"{name}/**/*.*")):
            archive.write(path, path.relative_to(folder))
    unzipped = sum(member.file_size for member in zipfile.ZipFile(body).infolist())
    bodies[name] = body = body.getvalue()
    packages += f'''<package id="{name}" name="{name}" subdir="{subdir}"
url="http://localhost/{name}.zip" size="{len(body)}" unzip="1"
unzipped_size="{unzipped}" checksum="{hashlib.md5(body).hexdigest()}"
sha256_checksum="{hashlib.sha256(body).hexdigest()}"/>'''
index = f'''<?xml version="1.0"?><nltk_data><packages>{packages}</packages><collections/>
</nltk_data>'''

class Dripping(io.BytesIO):
    def read(self, size=-1):
        print("asked", flush=True)
        time.sleep(30)
        return super().read(10)
    read1 = read

def urlopen(url, *more, **options):
    address = url if isinstance(url, str) else url.full_url
    if address.endswith(".zip"):
        return (Dripping if slow else io.BytesIO)(bodies[pathlib.Path(address).stem])
    return io.BytesIO(index.encode())

nltk.downloader.urlopen = urlopen
from data import nltk_tagger
print(nltk_tagger()("a kite"))
"""


def fetch(home: Path, speed: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "NLTK_DATA"}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, speed],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_while_it_downloads_leaves_nothing_half_written(tmp_path):
    killed = fetch(tmp_path, "slow")
    assert killed.stdout.readline() == "asked\n", killed.communicate()
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {".tmp", ".lock", ".json"} and not list(tmp_path.rglob("*.zip"))
    for path in tmp_path.rglob("*.lock"):  # NLTK takes a lock of a minute ago for a dead process's
        os.utime(path, (0, 0))
    again = fetch(tmp_path, "fast")
    said, errors = again.communicate(timeout=60)
    assert again.returncode == 0 and "('kite', 'NN')" in said, errors
