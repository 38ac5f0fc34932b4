"""Downloads from real servers on this machine, hostile archives, and what is left on the disk when things go wrong."""
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from conftest import ROOT
from filelock import FileLock
from PIL import Image

from ctrlscam.data import INDEXES
from ctrlscam.download import (Archive, ArchiveError, DownloadError, Expected, Limits, Origin, check_address, check_dataset, download_file, extract_archive,
                               get_dataset, list_datasets, read_sources, readme_text)

BODY = np.random.default_rng(0).bytes(400_000)


# A server whose paths are functions of the request, and the smallest data set in CUB's layout

class Site:
    """An http or https server on a free port of this machine; `paths` maps a path to a function of the request handler."""

    def __init__(self, paths, certificate=None):
        self.seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self.seen.append((handler.path, dict(handler.headers)))
                try:
                    paths.get(handler.path.split("?")[0], lambda request: request.send_error(404))(handler)
                except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                    pass  # the client has left, which is what some tests want

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.root = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def offer(self, path, body=BODY, **changes):
        known = dict(bytes=len(body), sha256=hashlib.sha256(body).hexdigest(), most_files=10_000, most_bytes=10**9)
        return Archive(url=self.root + path, **{**known, **changes})


def answer(request, body, status=200, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()
    request.wfile.write(body)


def whole(body=BODY, ranges=True, upto=None):
    """A path that serves `body`; whole, or what is asked for by Range; at first only `upto` bytes of it."""
    tries = []

    def path(request):
        tries.append(request)
        wanted = request.headers.get("Range") if ranges else None
        start = int(wanted[6:-1]) if wanted else 0
        if start >= len(body):
            return answer(request, b"", 416)
        sent = body[start:] if upto is None or len(tries) > 1 else body[start:upto]
        span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if wanted else {}
        return answer(request, sent, 206 if wanted else 200, Content_Length=len(body) - start, **span)

    return path


def redirect(to):
    return lambda request: answer(request, b"", 302, Location=to, Set_Cookie="who=me; Path=/")


def image(width):
    content = io.BytesIO()
    Image.fromarray(np.full((8, width, 3), width % 256, dtype=np.uint8)).save(content, "png")
    return content.getvalue()


def cub_files(count=4):
    """Path → content of a set in CUB's layout with two classes and `count` images, of which the last two are for testing."""
    names = [f"{'001.Wren' if number % 2 else '002.Gull'}/{number}.png" for number in range(1, count + 1)]
    lines = {"images.txt": lambda number, name: name, "image_class_labels.txt": lambda number, name: int(name[:3]),
             "train_test_split.txt": lambda number, name: int(number <= count - 2), "bounding_boxes.txt": lambda number, name: "0 0 4 4"}
    files = {name: "".join(f"{number} {line(number, image)}\n" for number, image in enumerate(names, 1)).encode() for name, line in lines.items()}
    return {**files, "classes.txt": b"1 001.Wren\n2 002.Gull\n", **{f"images/{name}": image(10 + number) for number, name in enumerate(names)}}


def tar_bytes(files, mode="w:gz"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def cub_body(count=4):
    return tar_bytes({f"CUB_200_2011/{name}": data for name, data in cub_files(count).items()} | {"attributes.txt": b"beside"})


def cub_sources(*archives, count=4, **changes):
    """sources.json's entry of cub200 with other archives and counts."""
    entry = read_sources(ROOT / "data" / "sources.json")["cub200"]
    expected = changes.pop("expected", Expected(train=count - 2, test=2, classes=2))
    return {"cub200": entry.model_copy(update=dict(archives=list(archives), expected=expected, disk_bytes=100_000, **changes))}


def lies_in(folder):
    """All paths below a folder, and what they are."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate with its key in one file."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl command is needed to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", "key.pem", "-out", "certificate.pem"], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return folder


@pytest.fixture
def trusted(certificate, monkeypatch):
    """Servers with the certificate are trusted in this test."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "certificate.pem"))
    return certificate / "both.pem"


def refused(archive, folder, *words, **options):
    """The error of a download that must fail, checked for `words`; no finished file may be there."""
    with pytest.raises(DownloadError) as caught:
        download_file(archive, folder, progress=False, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (folder / archive.file_name).exists()
    return str(caught.value)


# Downloads (fault 30)

def test_good_file(tmp_path):
    with Site({"/a.tgz": whole()}) as site:
        file = download_file(site.offer("/a.tgz?download=1"), tmp_path, progress=False)
        assert file.read_bytes() == BODY and lies_in(tmp_path) == ["a.tgz"]
        download_file(site.offer("/a.tgz?download=1"), tmp_path, progress=False)
        assert len(site.seen) == 1, "a file that is there was fetched again"


def test_good_file_over_https(tmp_path, trusted):
    with Site({"/a.tgz": whole()}, trusted) as site:
        assert download_file(site.offer("/a.tgz"), tmp_path, progress=False).read_bytes() == BODY


def test_untrusted_certificate(tmp_path, certificate):
    with Site({"/a.tgz": whole()}, certificate / "both.pem") as site:
        refused(site.offer("/a.tgz"), tmp_path, "its certificate could not be verified")
        assert not site.seen


@pytest.mark.parametrize("checksum", [dict(sha256=None, md5=hashlib.md5(BODY).hexdigest()), dict(bytes=None)], ids=["md5", "size not stated"])
def test_what_owners_state(tmp_path, checksum):
    with Site({"/a.tgz": whole()}) as site:
        assert download_file(site.offer("/a.tgz", **checksum), tmp_path, progress=False).read_bytes() == BODY


def test_fault_30_cut_file_is_kept_as_part_and_continued(tmp_path):
    with Site({"/a.tgz": whole(upto=200_000)}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "cut after 200,000 of 400,000 bytes", "continues from there")
        assert lies_in(tmp_path) == ["a.tgz.part"]
        assert download_file(site.offer("/a.tgz"), tmp_path, progress=False).read_bytes() == BODY
        assert [headers.get("Range") for _, headers in site.seen] == [None, "bytes=200000-"]
        assert lies_in(tmp_path) == ["a.tgz"]


def test_part_is_begun_anew_where_the_server_cannot_continue(tmp_path):
    def wrong_range(request):
        start = request.headers.get("Range")
        answer(request, BODY, 206 if start else 200, **({"Content_Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"} if start else {}), Content_Length=len(BODY))

    for number, path in enumerate([whole(ranges=False), wrong_range]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.tgz.part").write_bytes(b"x" * 1000)
        with Site({"/a.tgz": path}) as site:
            assert download_file(site.offer("/a.tgz"), folder, progress=False).read_bytes() == BODY


def test_part_longer_than_the_file(tmp_path):
    (tmp_path / "a.tgz.part").write_bytes(BODY + b"more")
    with Site({"/a.tgz": whole()}) as site:
        assert download_file(site.offer("/a.tgz"), tmp_path, progress=False).read_bytes() == BODY


def test_whole_part_with_wrong_content_is_deleted(tmp_path):
    (tmp_path / "a.tgz.part").write_bytes(bytes(len(BODY)))
    with Site({"/a.tgz": whole()}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "another checksum")
        assert not lies_in(tmp_path) and not site.seen


def test_fault_30_wrong_checksum(tmp_path):
    with Site({"/a.tgz": whole()}) as site:
        refused(site.offer("/a.tgz", sha256="0" * 64), tmp_path, "a.tgz: what arrived has another checksum", "was deleted")
    assert not lies_in(tmp_path)


@pytest.mark.parametrize("status, words", [(404, "404 (Not Found)"), (403, "403 (Forbidden)"), (500, "500 (Internal Server Error)"), (299, "299 (unknown)")])
def test_fault_30_status(tmp_path, status, words):
    with Site({"/a.tgz": lambda request: answer(request, b"gone", status)}) as site:
        refused(site.offer("/a.tgz"), tmp_path, words)
    assert not lies_in(tmp_path)


@pytest.mark.parametrize("headers, body", [({"Content_Type": "text/html; charset=utf-8"}, b"Log in"), ({}, b"  \n<!DOCTYPE html><p>Log in"), ({}, b"<HTML><p>Log in")],
                         ids=["by type", "by doctype", "by tag"])
def test_fault_30_login_page(tmp_path, headers, body):
    with Site({"/a.tgz": lambda request: answer(request, body, **headers)}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "the server answered with a web page")
    assert not lies_in(tmp_path)


def test_login_page_does_not_cost_a_part(tmp_path):
    (tmp_path / "a.tgz.part").write_bytes(BODY[:1000])
    with Site({"/a.tgz": lambda request: answer(request, b"<html>", Content_Type="text/html")}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "web page")
    assert (tmp_path / "a.tgz.part").read_bytes() == BODY[:1000]


def test_redirects_are_followed_without_cookies_or_credentials(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Site({"/a.tgz": redirect("/b/a.tgz?token=1"), "/b/a.tgz": redirect("c.tgz"), "/b/c.tgz": whole()}) as site:
        assert download_file(site.offer("/a.tgz"), tmp_path / "got", progress=False).read_bytes() == BODY
        assert [path for path, _ in site.seen] == ["/a.tgz", "/b/a.tgz?token=1", "/b/c.tgz"]
        for _, headers in site.seen:
            assert set(headers) <= {"Host", "User-Agent", "Accept-Encoding", "Accept", "Connection"}, headers


def test_fault_30_redirect_to_http(tmp_path, trusted):
    with Site({"/a.tgz": whole()}) as plain, Site({"/a.tgz": redirect(f"{plain.root}/a.tgz"), "/b.tgz": redirect("http://example.org/b.tgz?token=secret")}, trusted) as site:
        refused(site.offer("/a.tgz"), tmp_path, "redirects from https to http")
        assert "secret" not in refused(site.offer("/b.tgz"), tmp_path, "only https addresses are asked")
        assert not plain.seen


def test_redirect_loop(tmp_path):
    with Site({"/a.tgz": redirect("/a.tgz")}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "more than 5 redirects")
        assert len(site.seen) == 6


@pytest.mark.parametrize("to", ["https://127.0.0.1/a", "https://localhost/a", "https://10.1.2.3/a", "https://[::1]/a", "https://169.254.169.254/a", "https://inside.example/a"])
def test_redirect_into_the_local_network(tmp_path, monkeypatch, to):
    asked = []

    def resolve(host, *_, **__):
        known = {"data.example.org": "93.184.216.34", "inside.example": "192.168.1.1", "localhost": "127.0.0.1"}
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known.get(host, host), 0))]

    def get(url, **_):
        asked.append(url)
        response = requests.Response()
        response.status_code, response.headers, response.raw = 302, requests.structures.CaseInsensitiveDict(location=to), io.BytesIO()
        return response

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(requests, "get", get)
    archive = Archive(url="https://data.example.org/a.tgz", md5="0" * 32, most_files=1, most_bytes=1)
    refused(archive, tmp_path, "redirects into the local network")
    assert asked == ["https://data.example.org/a.tgz"], "the address inside was contacted"


def test_too_many_bytes_stop_at_once(tmp_path):
    sent = []

    def endless(request):
        request.send_response(200)
        request.end_headers()
        while len(sent) < 2000:
            request.wfile.write(bytes(100_000))
            sent.append(1)

    with Site({"/a.tgz": endless}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "more than the 400,000 bytes")
        refused(site.offer("/a.tgz", bytes=None, most_bytes=300_000), tmp_path, "more than the 300,000 bytes")
    assert len(sent) < 1000 and not lies_in(tmp_path)


def test_announced_size_differs(tmp_path):
    with Site({"/a.tgz": whole()}) as site:
        refused(site.offer("/a.tgz", bytes=len(BODY) + 1), tmp_path, "offers 400,000 bytes where 400,001 are expected")
    assert not lies_in(tmp_path)


@pytest.mark.parametrize("at_once, words", [(0, "no answer in time"), (100_000, "no data in time after 100,000 of 400,000 bytes")], ids=["silent", "stalled"])
def test_stalled_server(tmp_path, at_once, words):
    over = threading.Event()

    def stall(request):
        if at_once:
            request.send_response(200)
            request.send_header("Content-Length", str(len(BODY)))
            request.end_headers()
            request.wfile.write(BODY[:at_once])
        over.wait(10)

    with Site({"/a.tgz": stall}) as site:
        began = time.monotonic()
        refused(site.offer("/a.tgz"), tmp_path, words, patience=0.5)
        assert time.monotonic() - began < 8  # a patience of half a second; the server would wait ten
        over.set()


def test_dripping_server(tmp_path):
    over = threading.Event()

    def drip(request):
        request.send_response(200)
        request.end_headers()
        while not over.wait(0.05):
            request.wfile.write(b"x")

    with Site({"/a.tgz": drip}) as site:
        refused(site.offer("/a.tgz"), tmp_path, "bytes in 0.8 seconds", patience=0.8)
        over.set()


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(Archive(url=f"http://127.0.0.1:{port}/a.tgz", md5="0" * 32, most_files=1, most_bytes=1), tmp_path, "no connection")


def test_proxy_password_stays_out_of_messages(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    text = refused(Archive(url="https://example.org/a.tgz?token=secret", md5="0" * 32, most_files=1, most_bytes=1), tmp_path, "the proxy refused the connection")
    assert "secret" not in text


@pytest.mark.parametrize("url", ["http://example.org/a", "ftp://example.org/a", "file:///etc/passwd", "https://me:secret@example.org/a", "https:///a", "https://[::1/a", "a.tgz"])
def test_addresses_that_are_never_asked(url):
    with pytest.raises(DownloadError) as caught:
        check_address(url)
    assert "secret" not in str(caught.value)


def test_file_put_there_by_hand(tmp_path):
    with Site({"/a.tgz": whole()}) as site:
        (tmp_path / "a.tgz").write_bytes(BODY)
        download_file(site.offer("/a.tgz"), tmp_path, progress=False)
        (tmp_path / "a.tgz").write_bytes(b"something else")
        with pytest.raises(DownloadError, match="is not the archive that is expected"):
            download_file(site.offer("/a.tgz"), tmp_path, progress=False)
        assert (tmp_path / "a.tgz").read_bytes() == b"something else" and not site.seen


# Archives (fault 29)

def special(name, kind, link=""):
    """A tar with one good file and one member that is none."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for info in (tarfile.TarInfo("good.txt"), tarfile.TarInfo(name)):
            if info.name == name:
                info.type, info.linkname, info.devmajor, info.devminor = kind, link, 1, 3
            tar.addfile(info, io.BytesIO())
    return content.getvalue()


def crumbs(count):
    """A tar.gz with `count` empty files, its headers made by the block; after the first 20,000 the names come again."""
    block = 20_000
    headers = np.tile(np.frombuffer(tarfile.TarInfo("00000").tobuf(), dtype=np.uint8), (block, 1))
    for place in range(5):
        headers[:, place] = ord("0") + np.arange(block) // 10 ** (4 - place) % 10
    headers[:, 148:156] = ord(" ")
    total = headers.sum(axis=1, dtype=np.int64)
    for place in range(6):
        headers[:, 148 + place] = ord("0") + total // 8 ** (5 - place) % 8
    headers[:, 154] = 0
    return gzip.compress(headers.tobytes(), 1) * (count // block) + gzip.compress(bytes(1024))


def zeros_tar(size):
    """A tar.gz of one file of `size` zeros, as many small gzip streams in a row."""
    info = tarfile.TarInfo("zeros.jpg")
    info.size = size
    return gzip.compress(info.tobuf()) + gzip.compress(bytes(1 << 24)) * (size >> 24) + gzip.compress(bytes(1024))


def forged_header():
    """A tar.gz whose extended header claims 900 MB of text."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 900 << 20
    return gzip.compress(info.tobuf()) + gzip.compress(bytes(1 << 24)) * 57


def nested_headers():
    """A tar.gz of 1,000 long-name headers in a row, 100 kB each: tarfile reads them one within the other."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 100 << 10
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"a" * info.size) * 1000 + gzip.compress(tarfile.TarInfo("x").tobuf() + bytes(1024))


def sparse_tar():
    """A file that is one hole of a terabyte, in the old GNU form."""
    info = tarfile.TarInfo("hole")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[386:398], header[398:410], header[483:495] = b"S", b"%011o\0" % 0, b"%011o\0" % 0, b"%011o\0" % (1 << 33 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def zip_bytes(*members):
    """A zip of (name or ZipInfo, content) pairs."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members:
            packed.writestr(name, data)
    return content.getvalue()


def zip_info(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def encrypted_zip():
    content = bytearray(zip_bytes(("a.jpg", b"x")))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


HOSTILE = {
    "tar with ../x": (lambda: tar_bytes({"good.txt": b"", "../x": b"evil"}), "leads out of its folder"),
    "tar with a/../../x": (lambda: tar_bytes({"a/../../x": b"evil"}), "leads out of its folder"),
    "absolute path": (lambda: tar_bytes({"/var/ctrlscam-evil": b"evil"}), "leads out of its folder"),
    "symbolic link out of the root": (lambda: special("link", tarfile.SYMTYPE, "../../etc"), "a link or a special file"),
    "symbolic link inside": (lambda: special("link", tarfile.SYMTYPE, "good.txt"), "a link or a special file"),
    "hard link out of the root": (lambda: special("link", tarfile.LNKTYPE, "/etc/passwd"), "a link or a special file"),
    "device node": (lambda: special("null", tarfile.CHRTYPE), "a link or a special file"),
    "block device": (lambda: special("disk", tarfile.BLKTYPE), "a link or a special file"),
    "pipe": (lambda: special("pipe", tarfile.FIFOTYPE), "a link or a special file"),
    "a million tiny files": (lambda: crumbs(1_000_000), "more than 2,000 members"),
    "1 GB of zeros in 1 MB": (lambda: zeros_tar(1 << 30), "far more than a data set"),
    "forged header": (forged_header, "a header claims"),
    "headers within headers": (nested_headers, "damaged or no archive"),
    "hole of a terabyte": (sparse_tar, "a link or a special file"),
    "name twice": (lambda: special("good.txt", tarfile.REGTYPE), "comes twice"),
    "names that differ in case": (lambda: tar_bytes({"Wren/a.jpg": b"", "wren/b.jpg": b""}), "clash"),
    "file as folder": (lambda: tar_bytes({"a": b"", "a/b": b""}), "clash"),
    "name ends in a dot": (lambda: tar_bytes({"a.": b""}), "not every machine"),
    "line break in a name": (lambda: tar_bytes({"a\nb": b""}), "not allowed"),
    "zip slip": (lambda: zip_bytes(("good.txt", b""), ("../x", b"evil")), "leads out of its folder"),
    "zip slip with backslash": (lambda: zip_bytes(("..\\x", b"evil")), "not allowed"),
    "zip with absolute path": (lambda: zip_bytes(("/var/ctrlscam-evil", b"evil")), "leads out of its folder"),
    "zip bomb": (lambda: zip_bytes(("zeros", bytes(200 << 20))), "far more than a data set"),
    "zip with a link": (lambda: zip_bytes((zip_info("link", stat.S_IFLNK | 0o777), b"/etc/passwd")), "a link or a special file"),
    "zip with a pipe": (lambda: zip_bytes((zip_info("pipe", stat.S_IFIFO | 0o644), b"")), "a link or a special file"),
    "zip of many files": (lambda: zip_bytes(*((f"{number}", b"") for number in range(2_001))), "more than 2,000 members"),
    "encrypted zip": (encrypted_zip, "is encrypted"),
    "text": (lambda: b"<html>not an archive</html>" * 100, "damaged or no archive"),
    "nothing": (lambda: b"", "damaged or no archive"),
    "cut tar.gz": (lambda: tar_bytes({"a.jpg": BODY})[:100_000], "damaged or no archive"),
    "cut tar": (lambda: tar_bytes({"a.jpg": BODY}, mode="w")[:100_000], "damaged or no archive"),
    "cut zip": (lambda: zip_bytes(("a.jpg", BODY))[:100_000], "damaged or no archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_fault_29_hostile_archive(tmp_path, name):
    make, words = HOSTILE[name]
    (tmp_path / "bad.archive").write_bytes(make())
    process, target = psutil.Process(), tmp_path / "inside" / "target"
    before, began = process.memory_info().rss, time.monotonic()
    with pytest.raises(ArchiveError) as caught:
        extract_archive(tmp_path / "bad.archive", target, limits=Limits(files=2_000), progress=False)
    assert words in str(caught.value) and "bad.archive" in str(caught.value), str(caught.value)
    assert time.monotonic() - began < 10
    assert process.memory_info().rss - before < 100 << 20
    assert lies_in(tmp_path) == ["bad.archive"] and not list((tmp_path / "inside").iterdir())
    assert not Path("/var/ctrlscam-evil").exists()


def test_good_archives_of_all_kinds(tmp_path):
    files = {"top/images/001.Wren/a b.jpg": BODY, "top/Zaunkönig.txt": b"", "beside.txt": b"x"}
    for number, body in enumerate([tar_bytes(files), tar_bytes(files, mode="w"), zip_bytes(*files.items())]):
        (tmp_path / "archive").write_bytes(body)
        assert extract_archive(tmp_path / "archive", tmp_path / str(number), strip="top", progress=False) == 3
        assert lies_in(tmp_path / str(number)) == sorted(["images/001.Wren/a b.jpg", "Zaunkönig.txt", "beside.txt"])
        assert (tmp_path / str(number) / "images/001.Wren/a b.jpg").read_bytes() == BODY


def test_target_is_never_overwritten_and_planted_link_never_followed(tmp_path):
    (tmp_path / "archive").write_bytes(tar_bytes({"a.txt": b"new"}))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a.txt").write_bytes(b"old")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_bytes(b"mine")
    (tmp_path / ".target.unpacking").symlink_to(tmp_path / "mine")
    with pytest.raises(ArchiveError, match="not overwritten"):
        extract_archive(tmp_path / "archive", tmp_path / "target", progress=False)
    assert lies_in(tmp_path) == ["archive", "mine/precious.txt", "target/a.txt"]
    assert (tmp_path / "target" / "a.txt").read_bytes() == b"old"


# Whole data sets (faults 30 and 31)

def get(tmp_path, sources, **options):
    return get_dataset("cub200", tmp_path, sources=sources, progress=False, **options)


def test_get_and_get_again(tmp_path):
    body = cub_body()
    with Site({"/cub.tgz": whole(body)}) as site:
        sources = cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011"))
        assert get(tmp_path, sources) == [tmp_path / "CUB_200_2011"]
        assert set(lies_in(tmp_path / "CUB_200_2011")) == {*cub_files(), "attributes.txt"}
        assert lies_in(tmp_path / "downloads") in ([], ["cub200.lock"])
        assert get(tmp_path, sources) == [tmp_path / "CUB_200_2011"]
        assert len(site.seen) == 1
        assert check_dataset("cub200", tmp_path, images=False, sources=sources).verdict == "complete"


def test_parts_in_several_archives(tmp_path):
    files = cub_files()
    texts, images = (tar_bytes({name.removeprefix("images/"): data for name, data in files.items() if name.startswith("images/") is are}) for are in (False, True))
    with Site({"/texts.tar": whole(texts), "/images.tar": whole(images)}) as site:
        get(tmp_path, cub_sources(site.offer("/texts.tar", texts), site.offer("/images.tar", images, into="images")))
    assert set(lies_in(tmp_path / "CUB_200_2011")) == set(files)


@pytest.mark.parametrize("fault", ["404", "login page", "wrong checksum", "cut", "redirect"])
def test_fault_30_every_error_ends_with_the_manual_steps(tmp_path, fault):
    body = cub_body()
    paths = {"/login page": lambda request: answer(request, b"<html>"), "/wrong checksum": whole(body[:-1] + b"x"), "/cut": whole(body, upto=100),
             "/redirect": redirect("http://example.org/")}
    with Site(paths) as site, pytest.raises(DownloadError) as caught:
        get(tmp_path, cub_sources(site.offer(f"/{fault}".replace(" ", "%20") if fault not in paths else f"/{fault}", body)))
    text = str(caught.value)
    assert "by hand" in text and site.root in text and "├── images.txt" in text and hashlib.sha256(body).hexdigest() in text
    assert not (tmp_path / "CUB_200_2011").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("expected, words", [(Expected(train=3, test=2, classes=2), "train: 2 of 3"), (Expected(train=2, test=1, classes=2), "test: 2 of 1"),
                                             (Expected(train=2, test=2, classes=3), "classes: 2 of 3")], ids=["train", "test", "classes"])
def test_fault_29_wrong_counts(tmp_path, expected, words):
    body = cub_body()
    with Site({"/cub.tgz": whole(body)}) as site, pytest.raises(ArchiveError, match=words):
        get(tmp_path, cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011"), expected=expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads"]


def test_image_missing_from_the_archive(tmp_path):
    files = cub_files()
    del files["images/001.Wren/3.png"]
    body = tar_bytes(files)
    with Site({"/cub.tgz": whole(body)}) as site, pytest.raises(ArchiveError, match="missing images: 1: images/001.Wren/3.png"):
        get(tmp_path, cub_sources(site.offer("/cub.tgz", body)))
    assert not (tmp_path / "CUB_200_2011").exists()


def test_unconfirmed_counts_do_not_refuse(tmp_path):
    body = cub_body()
    with Site({"/cub.tgz": whole(body)}) as site:
        get(tmp_path, cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011"), expected=Expected(train=9, test=9, classes=2, confirmed=False)))
    assert (tmp_path / "CUB_200_2011" / "images.txt").is_file()


def test_hostile_archive_through_get(tmp_path):
    body = tar_bytes({f"CUB_200_2011/{name}": data for name, data in cub_files().items()} | {"CUB_200_2011/../../x": b"evil"})
    with Site({"/cub.tgz": whole(body)}) as site, pytest.raises(ArchiveError, match="leads out of its folder"):
        get(tmp_path / "data", cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011")))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["downloads"]


def test_incomplete_set_is_left_alone(tmp_path):
    (tmp_path / "CUB_200_2011").mkdir()
    (tmp_path / "CUB_200_2011" / "images.txt").write_text("1 001.Wren/1.png\n")
    with Site({}) as site, pytest.raises(DownloadError, match="Nothing was changed") as caught:
        get(tmp_path, cub_sources(site.offer("/cub.tgz")))
    assert "classes.txt, from CUB_200_2011.tgz" in str(caught.value) and "move that folder away" in str(caught.value)
    assert lies_in(tmp_path) == ["CUB_200_2011/images.txt"] and not site.seen


def test_no_space_is_said_before_anything_is_fetched(tmp_path):
    with Site({"/cub.tgz": whole()}) as site, pytest.raises(DownloadError, match="are needed in .* are free"):
        get(tmp_path, {"cub200": cub_sources(site.offer("/cub.tgz"))["cub200"].model_copy(update=dict(disk_bytes=10**18))})
    assert not site.seen


def test_two_gets_are_kept_apart(tmp_path):
    (tmp_path / "downloads").mkdir()
    with Site({"/cub.tgz": whole()}) as site, FileLock(tmp_path / "downloads" / "cub200.lock"):
        with pytest.raises(DownloadError, match="another process is getting cub200"):
            get(tmp_path, cub_sources(site.offer("/cub.tgz")))
        assert not site.seen


def test_data_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Site({"/cub.tgz": whole()}) as site, pytest.raises(DownloadError, match="cannot be written: .*Not a directory"):
        get(tmp_path / "file", cub_sources(site.offer("/cub.tgz")))


def test_joint_set_is_got_part_by_part(tmp_path):
    body = cub_body()
    with Site({"/cub.tgz": whole(body)}) as site:
        sources = cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011")) | {"nabird": read_sources()["nabird"]}
        with pytest.raises(DownloadError, match="nabird cannot be fetched"):
            get_dataset("cub+nabirds", tmp_path, sources=sources, progress=False)
    assert (tmp_path / "CUB_200_2011" / "images.txt").is_file()


def test_fault_31_killed_extraction_is_done_anew(tmp_path):
    """SIGKILL in the middle of unpacking: the hidden folder is no data set, and the next run begins anew from the archive that is there."""
    count = 1000
    slow = """
import time
import ctrlscam.download as download
from ctrlscam.cli import main
write = download._write
download._write = lambda *words: (time.sleep(0.002), write(*words))[1]  # so that the kill surely comes in the middle
main()
"""
    body = cub_body(count)
    with Site({"/cub.tgz": whole(body)}) as site:
        sources = cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011"), count=count)
        (tmp_path / "sources.json").write_text(json.dumps({"cub200": sources["cub200"].model_dump()}))
        data, hidden = tmp_path / "data", tmp_path / "data" / ".CUB_200_2011.unpacking" / "images" / "001.Wren"
        command = [sys.executable, "-c", slow, "data", "get", "cub200", "--data-dir", str(data), "--sources", str(tmp_path / "sources.json")]
        victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (hidden.is_dir() and len(os.listdir(hidden)) > 100) and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        written = len(os.listdir(hidden))
        assert 100 < written < count // 2, "the kill came too early or too late"
        assert not (data / "CUB_200_2011").exists()
        report = check_dataset("cub200", data, images=False, sources=sources)
        assert report.verdict == "not usable" and "interrupted" in report.as_text()
        assert dict(list_datasets(data, sources=sources)[["name", "state"]].values) == {"cub200": "not here"}

        (hidden / "0.png").write_bytes(b"left over")
        get(data, sources)
        assert len(site.seen) == 1, "the archive with the right checksum was fetched again"
    assert len(lies_in(data / "CUB_200_2011")) == count + 6 and not (data / "CUB_200_2011/images/001.Wren/0.png").exists()
    assert not list(data.glob(".*"))


def test_fault_31_interrupt_wipes(tmp_path, monkeypatch):
    body = cub_body()

    def interrupt(*_):
        raise KeyboardInterrupt

    with Site({"/cub.tgz": whole(body)}) as site:
        monkeypatch.setattr("ctrlscam.download._claim", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path, cub_sources(site.offer("/cub.tgz", body)))
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


# The list itself, and the page made from it

@pytest.fixture(scope="module")
def sources():
    return read_sources(ROOT / "data" / "sources.json")


def test_every_data_set_has_an_entry_in_step_with_its_index(sources):
    assert list(sources) == list(INDEXES)
    for name, origin in sources.items():
        assert origin.folder == INDEXES[name].folders[0], name
        assert (origin.how == "drawn") == (INDEXES[name].pixels == "drawn"), name
        assert all(archive.url.startswith("https://") for archive in origin.archives), name
        assert origin.layout[0] == f"{origin.folder}/", name


@pytest.mark.parametrize("name, counts", {"cub200": (5994, 5794, 200), "nabird": (23929, 24633, 555), "stancar": (8144, 8041, 196), "standog": (12000, 8580, 120),
                                          "aircraft": (6667, 3333, 100), "cifar10": (50000, 10000, 10), "cifar100": (50000, 10000, 100)}.items())
def test_published_counts(sources, name, counts):
    expected = sources[name].expected
    assert (expected.train, expected.test, expected.classes) == counts and expected.confirmed


def test_bounds_leave_room_for_the_real_thing(sources):
    for name, origin in sources.items():
        if origin.archives and INDEXES[name].pixels == "files":
            assert sum(archive.most_files for archive in origin.archives) > origin.expected.train + origin.expected.test, name
        if origin.archives:
            assert sum(archive.most_bytes for archive in origin.archives) > origin.disk_bytes, name


def test_readme_is_written_from_the_list(sources):
    assert (ROOT / "data" / "README.md").read_text(encoding="utf-8") == readme_text(sources), "data/README.md is not what readme_text() gives"


@pytest.mark.parametrize("change, words", [(dict(url="http://example.org/a"), "only https"), (dict(sha256=None, md5=None), "checksum is needed"), (dict(sha256="ABC"), "sha256"),
                                           (dict(into="../x"), "into"), (dict(strip="/x"), "strip"), (dict(mirror="x"), "mirror"), (dict(bytes=0), "bytes")],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_bad_list_is_refused(tmp_path, change, words):
    content = json.loads((ROOT / "data" / "sources.json").read_text(encoding="utf-8"))
    content["cub200"]["archives"][0].update(change)
    (tmp_path / "sources.json").write_text(json.dumps(content))
    with pytest.raises(DownloadError, match=words):
        read_sources(tmp_path / "sources.json")


def test_installed_package_finds_its_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlscam.download.project_root", lambda: tmp_path / "anywhere")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(DownloadError, match="the list of data sets is missing"):
        read_sources()
    (tmp_path / "share" / "ctrlscam").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "sources.json", tmp_path / "share" / "ctrlscam")
    assert list(read_sources()) == list(INDEXES)


def test_unknown_name_in_the_list(tmp_path, sources):
    (tmp_path / "sources.json").write_text(json.dumps({"cub2000": sources["cub200"].model_dump()}))
    with pytest.raises(DownloadError, match="unknown data sets cub2000"):
        read_sources(tmp_path / "sources.json")
    assert isinstance(sources["cub200"], Origin)
