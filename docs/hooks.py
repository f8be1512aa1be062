"""What MkDocs does besides: see ``hooks`` in mkdocs.yml.

* Mermaid, which draws the diagrams, becomes part of the site. The theme would load it from a CDN.
* Files of the repository that a page links to (``../deploy/nginx.conf``) become part of it as well,
  below ``source/``. A link to one that is not there fails the strict build.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import posixpath
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

logger = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).resolve().parent.parent

# One file without dependencies, of the major version that Material for MkDocs expects.
MERMAID = "@mermaid-js/tiny@11.17.2"
MERMAID_FILE = "package/dist/mermaid.tiny.js"
MERMAID_SHA256 = "7a644017d37f93c8359790884e6b67fb1f747c78eb20475952404bd87190a3f8"

LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<rest>[^)]*)\)")


def _mermaid() -> bytes:
    """The script, fetched by npm once and then kept."""
    kept = ROOT / "build" / "mermaid.js"
    if kept.exists():
        script = kept.read_bytes()
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise PluginError("npm is missing, by which Mermaid is fetched: install Node.js.")
        with tempfile.TemporaryDirectory() as name:
            done = subprocess.run(
                [npm, "pack", "--silent", "--pack-destination", name, MERMAID],
                cwd=name,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode:
                raise PluginError(f"npm cannot fetch {MERMAID}: {done.stderr.strip()}")
            [packed] = Path(name).glob("*.tgz")
            with tarfile.open(fileobj=io.BytesIO(packed.read_bytes())) as archive:
                member = archive.extractfile(MERMAID_FILE)
                assert member is not None
                script = member.read()
    if hashlib.sha256(script).hexdigest() != MERMAID_SHA256:
        raise PluginError(f"{MERMAID} is not the file that it was: its SHA-256 differs.")
    if not kept.exists():
        with contextlib.suppress(OSError):  # a checkout that this user cannot write to
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(script)
    return script


def _target(page: str, path: str) -> Path | None:
    """The file of the repository that a page's link leads to, if it leads out of the pages."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if not found.startswith("../"):
        return None
    file = (ROOT / "docs" / found).resolve()
    if file.is_file() and file.is_relative_to(ROOT):
        return file
    logger.warning("Doc file '%s' contains a link '%s', which leads to no file.", page, path)
    return None


def on_files(files: Files, *, config: Any) -> Files:
    files.append(File.generated(config, "assets/mermaid.js", content=_mermaid()))
    linked = {
        target
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
        if (target := _target(file.src_uri, match["path"])) is not None
    }
    for target in sorted(linked):
        uri = f"source/{target.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        target = _target(here, match["path"])
        if target is None:
            return match[0]
        uri = f"source/{target.relative_to(ROOT).as_posix()}"
        return f"]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{match['rest']})"

    return LINK.sub(replace, markdown)
