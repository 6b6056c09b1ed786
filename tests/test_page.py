"""What a person sees in a browser: what the pages say, and that what an image says stays text."""

import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import tarfile
import urllib.parse

import pytest
from conftest import TINYREG, get, open_url, run_tinyreg
from samples import make_docker_image, make_image, make_referrer, index, to_manifest

import tinyreg
from tinyreg import Access, Digest, Directory, Request, dispatch

ATTACK = "\"'><script>document.title='attacked'</script><img src=x onerror=\"document.title='attacked'\">\u202e"
CONFIG = {
    "os": "linux", "architecture": "amd64", "created": "2020-02-03T04:05:06.789Z", "author": ATTACK,
    "config": {"Env": ["PATH=/bin", ATTACK], "Cmd": ["serve", ATTACK], "Labels": {"maker": ATTACK, ATTACK: "x"}},
    "history": [{"created_by": "ADD base.tar /"}, {"created_by": "ENV A=B", "empty_layer": True},
                {"created_by": "RUN make " + ATTACK}]}
BASE = b"a base that two images share" * 1000


def fill(root):
    """A store with an image full of attacks, a multi-platform one, a signature, and a second repository."""
    store = Directory(str(root))
    config = json.dumps(CONFIG).encode()
    image = make_image(store, "lab/app", "1.0", (BASE, b"second"), config, annotations={"note": ATTACK})
    other = make_image(store, "lab/app", None, (BASE, b"third"), config.replace(b"amd64", b"arm64"))
    store.put_manifest("lab/app", to_manifest(index(image, other)), ["multi"])
    make_image(store, "lab/other", "latest", (BASE,))
    make_referrer(store, "lab/app", image, artifactType="application/vnd.example.signature")
    return image


class Document(html.parser.HTMLParser):
    """A page as a list of elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


PAGES = ["", "?q=lab", "?q=nothing", "?repository=lab/app", "?repository=lab/app&reference=1.0",
         "?repository=lab/app&reference=multi", "use", "disk", "live"]


@pytest.fixture
def registry(start_server, tmp_path):
    fill(tmp_path / "registry")
    return start_server(tmp_path / "registry", "--log", "explain")


def test_a_manifest_without_a_tag_is_listed(store, monkeypatch):
    """An image that was pulled by its digest left its repository looking empty."""
    image = make_image(store, "a", None)
    store.put_manifest("a", to_manifest(index(image)), ["1"])
    alone = make_image(store, "a", None, (b"alone",))
    make_referrer(store, "a", alone)
    shown = dispatch(store, Access("pull"), Request("GET", "/?repository=a")).body.decode()
    assert "Without a tag" in shown and alone.digest[:19] in shown
    assert image.digest[:19] not in shown.partition("Without a tag")[2]
    monkeypatch.setattr(tinyreg, "MAX_PAGE_READ", 100)  # where it would take long
    shown = dispatch(store, Access("pull"), Request("GET", "/?repository=a")).body.decode()
    assert "Without a tag" not in shown and "tinyreg.py ls a lists it" in shown


def test_pages_are_sound_accessible_and_self_contained(registry):
    for path in PAGES:
        check_page(get(registry.url + "/" + path))


def check_page(answer):
    status, headers, text = answer.status, answer.headers, answer.text
    assert status == 200
    document = Document(text)
    assert document.open == []
    assert document.all("html")[0]["lang"] == "en"
    assert [len(document.all(tag)) for tag in ("main", "h1", "nav")] == [1, 1, 1]
    assert text.index("<title>") < text.index("<body>")
    assert "width=device-width" in [meta.get("content") for meta in document.all("meta")]
    labelled = {label["for"] for label in document.all("label")}
    assert all(field["id"] in labelled for field in document.all("input"))
    assert all(heading.get("scope") == "col" for heading in document.all("th"))
    assert len(document.all("caption")) == len(document.all("table"))
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in document.all("svg"))
    identifiers = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")], (tag, attributes)
        for name in ("href", "action"):  # relative, so that it works below any path of a proxy
            assert not re.match(r"[a-z]+:(?!,)|/", attributes.get(name, "")), attributes
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_every_link_of_every_page_leads_somewhere(registry):
    for path in PAGES:
        where = registry.url + "/" + path
        links = {urllib.parse.urljoin(where, link["href"]) for link in Document(get(where).text).all("a")}
        assert len(links) > 4
        for target in sorted(links):
            assert "/live/" in target or get(target)[0] == 200, target


def test_nothing_that_an_image_says_becomes_markup(registry):
    for path in ("?repository=lab/app&reference=1.0", "?repository=lab/app&reference=multi", "?repository=lab/app",
                 "?q=" + urllib.parse.quote(ATTACK)):
        answer = get(registry.url + "/" + path)
        status, text = answer.status, answer.text
        document = Document(text)
        assert status == 200
        assert len(document.all("script")) == 1 and not document.all("img")
        assert "\u202e" not in text
    assert "<script>document.title" in Document(get(registry.url + "/" + PAGES[4]).text).text


def test_an_image_page_tells_layers_commands_labels_sharing_and_referrers(registry):
    document = Document(get(registry.url + "/?repository=lab/app&reference=1.0").text)
    text = document.text
    for words in ("linux/amd64", "ADD base.tar /", "RUN make", "ENV A=B", "PATH=/bin", "maker", "27.3 KiB",
                  "application/vnd.example.signature", "years ago", "note"):
        assert words in text, words
    assert "./?repository=lab%2Fother" in [link["href"] for link in document.all("a")]  # which has the base as well
    text = Document(get(registry.url + "/?repository=lab/app&reference=multi").text).text
    assert "linux/amd64, linux/arm64" in text


def test_pull_commands_name_the_host_that_the_client_sees(registry):
    path = registry.url + "/?repository=lab/app&reference=1.0"
    text = Document(get(path).text).text
    assert "docker pull %s/lab/app:1.0" % registry.host in text
    assert "podman pull --tls-verify=false %s/lab/app:1.0" % registry.host in text
    assert "ctr images pull --plain-http %s/lab/app:1.0" % registry.host in text
    text = Document(get(path, X_Forwarded_Host="registry.example, proxy", X_Forwarded_Proto="https").text).text
    assert "docker pull registry.example/lab/app:1.0" in text and "plain-http" not in text
    document = Document(get(path, X_Forwarded_Host="x;rm -rf ~ <b>").text)
    assert "rm -rf" not in document.text and not document.all("b")


def test_what_is_to_be_copied_has_its_lines(registry):
    text = Document(get(registry.url + "/use").text).text
    assert "docker tag alpine {0}/me/alpine\ndocker push {0}/me/alpine".format(registry.host) in text
    assert '[[registry]]\nlocation = "%s"\ninsecure = true' % registry.host in text
    assert "\\n" not in text


def test_configs_that_are_not_what_they_should_be_are_no_error(registry, store):
    for number, config in enumerate((
            b"[]", b"not JSON", b'{"history":{},"config":[],"created":7,"os":["x"]}',
            b'{"history":[1,{"created_by":{"a":1}},{"empty_layer":true}],"config":{"Env":"x","Labels":[1],"Cmd":{}}}',
            b'{"created":"0001-01-01T00:00:00Z","config":{"Labels":{"a":["b"],"c":null}},"author":"\\ud800\\u0000"}',
            b'{"created":"9999-99-99T99:99:99Z","os":{"a":"b"},"history":"x"}',
            b'{"author":DEEP,"config":{"Env":DEEP,"Labels":{"a":DEEP}},"history":[{"created_by":DEEP}],"created":DEEP}'
            .replace(b"DEEP", b"[" * 400 + b"]" * 400))):
        make_image(store, "odd", "t%d" % number, config=config)
        answer = get("%s/?repository=odd&reference=t%d" % (registry.url, number))
        status, text = answer.status, answer.text
        assert status == 200 and "Layers" in text, config
    assert get(registry.url + "/?repository=odd")[0] == 200


def test_an_index_of_indexes_that_unfolds_for_ever_is_read_once(registry, store):
    manifest = make_image(store, "deep", None)
    for _ in range(40):
        manifest = to_manifest(index(manifest, manifest))
        store.put_manifest("deep", manifest, ["top"])
    assert get(registry.url + "/?repository=deep&reference=top")[0] == 200


def test_repositories_are_searched_and_paged(store, monkeypatch):
    monkeypatch.setattr(tinyreg, "ROWS", 5)
    for number in range(12):
        make_docker_image(store, "team%d/app" % number)

    def show(target):
        return Document(dispatch(store, Access("pull"), Request("GET", target)).body.decode())

    seen, target, pages = [], "/", 0
    while target:
        links = [link["href"] for link in show(target).all("a")]
        seen += [link for link in links if link.startswith("./?repository=") and "reference" not in link]
        target = next((link[1:] for link in links if "last=" in link), None)
        pages += 1
    assert pages == 3 and len(seen) == len(set(seen)) == 12
    text = show("/?q=TEAM1").text
    assert "team1/app" in text and "team11/app" in text and "team2/app" not in text


def test_a_repository_that_is_deleted_while_its_page_is_made_is_left_out(store, monkeypatch):
    for name in ("gone", "here"):
        make_image(store, name)
    list_tags = store.tags

    def tags(name, last=""):
        if name == "gone":
            raise tinyreg.RegistryError("NAME_UNKNOWN", name)
        return list_tags(name, last)

    monkeypatch.setattr(store, "tags", tags)
    answer = dispatch(store, Access("pull"), Request("GET", "/"))
    assert answer.status == 200
    assert b"repository=here" in answer.body and b"repository=gone" not in answer.body


def test_only_what_one_may_pull_is_shown(store, tmp_path):
    fill(tmp_path / "registry")
    (tmp_path / "rules").write_text("** @anonymous pull\nlab/other @anonymous none\n")
    access = Access("none", None, str(tmp_path / "rules"))

    def show(target):
        answer = dispatch(store, access, Request("GET", target))
        return answer.status, answer.body.decode()

    for target in ("/", "/disk", "/?repository=lab/app&reference=1.0", "/?q=other"):
        status, text = show(target)
        assert status == 200 and "lab/other" not in text.replace("“other”", "") and "lab%2Fother" not in text, target
    assert [show(target)[0] for target in ("/?repository=lab/other", "/?repository=lab/app")] == [404, 200]


def test_what_is_not_there_is_an_error_and_no_page(registry):
    assert get(registry.url + "/?repository=no/such")[0] == 404
    assert get(registry.url + "/?repository=lab/app&reference=no")[0] == 404
    assert get(registry.url + "/?repository=BAD")[0] == 400
    assert get(registry.url + "/?repository=lab/app&reference=sha256:1")[0] == 400


def test_the_registry_hands_itself_out(registry):
    with open_url(registry.url + "/tinyreg.py") as answer, open(TINYREG, "rb") as file:
        assert answer.headers["Content-Disposition"] == "attachment; filename=tinyreg.py"
        assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(file.read()).digest()


def test_a_registry_whose_file_was_taken_away_says_so(monkeypatch, store, tmp_path):
    monkeypatch.setattr(tinyreg, "__file__", str(tmp_path / "gone.py"))
    assert dispatch(store, Access("pull"), Request("GET", "/tinyreg.py")).status == 404


def test_an_image_is_downloaded_as_an_archive(registry, tmp_path):
    document = Document(get(registry.url + "/?repository=lab/app&reference=1.0").text)
    link, = [link["href"] for link in document.all("a") if link["href"].startswith("archive/")]
    path = tmp_path / "image.tar"
    with open_url("%s/%s" % (registry.url, link)) as answer, open(str(path), "wb") as file:
        shutil.copyfileobj(answer, file)
        assert int(answer.headers["Content-Length"]) == path.stat().st_size
        assert answer.headers["Content-Disposition"] == "attachment; filename=lab_app_1.0.tar"
    with tarfile.open(str(path)) as tar:
        assert BASE in [tar.extractfile(member).read() for member in tar if member.isfile()]
    assert run_tinyreg("load", "--root", tmp_path / "other", path).returncode == 0
    there = [Directory(str(tmp_path / root)).resolve("lab/app", "1.0") for root in ("registry", "other")]
    assert there[0] == there[1]
    signature, = list(Directory(str(tmp_path / "other")).referrers("lab/app", there[0]))
    assert signature.artifact_type == "application/vnd.example.signature"
    assert get("%s/archive/lab/app@%s.tar" % (registry.url, signature.digest), Range="x")[0] == 200
    assert [get(registry.url + "/archive/" + name)[0] for name in ("lab/app:no.tar", "no:x.tar", "X:x.tar")] == [
        404, 404, 400]


def test_disk_use_counts_what_is_shared_once(store, tmp_path):
    fill(tmp_path / "registry")
    usage = store.usage()
    own, shared = usage["repositories"]["lab/other"]
    assert 0 <= shared - len(BASE) < 100 and 0 < own < 1000
    assert usage["bytes"] < sum(sum(pair) for pair in usage["repositories"].values())
    assert usage["shared"][Digest.of(BASE)] == ["lab/app", "lab/other"]
    assert usage["unlinked"] == 0


# A real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(url, profile, *options):
    """Open a page in headless Chromium; returns what it printed, and its console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--enable-logging=stderr", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--user-data-dir=%s" % profile] + list(options) + [url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_chromium_runs_our_script_and_nobody_elses(registry, tmp_path):
    shown, console = browse(registry.url + "/?repository=lab/app&reference=1.0", tmp_path / "profile", "--dump-dom")
    assert console == []  # where it would say what the Content-Security-Policy refused
    assert "<title>lab/app:1.0 – tinyreg</title>" in shown  # and not "attacked"
    assert shown.count('<button type="button">Copy</button>') == 3  # our script showed them


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.parametrize("name, width, scheme", [("light", 1000, "1"), ("dark", 1000, "0"), ("phone", 500, "1")])
def test_chromium_paints_it_light_dark_and_narrow(registry, tmp_path, name, width, scheme):
    picture = tmp_path / (name + ".png")
    _, console = browse(registry.url + "/?repository=lab/app&reference=1.0", tmp_path / "profile", "--hide-scrollbars",
                        "--window-size=%d,1200" % width, "--blink-settings=preferredColorScheme=" + scheme,
                        "--screenshot=%s" % picture)
    assert console == [] and picture.stat().st_size > 10000
