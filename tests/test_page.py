"""What a person sees in a browser: what the pages say, and that what an image says stays text."""

import base64
import errno
import fcntl
import hashlib
import html.parser
import json
import os
import re
import shutil
import ssl
import subprocess
import tarfile
import time
import urllib.parse

import pytest
from conftest import TINYREG, ask, get, open_url, run_tinyreg, until
from engines import require
from samples import (descriptor, image as image_document, index, make_docker_image, make_image, make_referrer,
                     push_blob, to_manifest)

import tinyreg
from tinyreg import Access, Digest, Directory, Request, collect_garbage, dispatch

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
        if tag not in ("meta", "link", "input", "br", "wbr"):
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
def registry(start_server, tmp_path, no_fsync):
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
    assert all(field["id"] in labelled for field in document.all("input") if field["type"] != "hidden")
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
                  "application/vnd.example.signature", "years ago", "note", "serve"):
        assert words in text, words
    assert "./?repository=lab%2Fother" in [link["href"] for link in document.all("a")]  # which has the base as well
    text = Document(get(registry.url + "/?repository=lab/app&reference=multi").text).text
    assert "linux/amd64, linux/arm64" in text and "Platforms" in text


def test_a_browser_is_refused_with_a_page(start_server, tmp_path):
    """A student opens /live, or presses Cancel where a password is asked for; curl gets JSON."""
    (tmp_path / "users").write_text("alice:%s\n" % tinyreg.new_hash("pw"))
    for options, status, words in ((["--anonymous", "pull"], 403, "Clients may pull; whoever runs this registry"),
                                   (["--users", tmp_path / "users"], 401, "Authentication required.")):
        server = start_server(tmp_path / str(status), *options)
        answer = server.ask("GET", "/live", accept="text/html,*/*;q=0.8")
        text = Document(answer.text).text
        assert (answer.status, words in text) == (status, True), text
        plain = server.ask("GET", "/live")
        assert plain.status == status and plain.error and plain.headers["WWW-Authenticate"] == answer.headers[
            "WWW-Authenticate"] and server.ask("GET", "/v2/", accept="text/html").text[:1] == "{"


@pytest.mark.parametrize("repositories, more", [(5, False), (6, True)])
def test_a_layer_of_many_repositories_says_that_there_are_more(store, repositories, more):
    """Four are named. The title has a digest as people write it; the whole one is below."""
    digest = [make_image(store, "lab/app%d" % number, layers=[b"base"]) for number in range(repositories)][0].digest
    request = Request("GET", "/?repository=lab/app0&reference=" + digest)
    document = Document(dispatch(store, Access("pull"), request).body.decode())
    others = {link["href"] for link in document.all("a")} & {"./?repository=lab%%2Fapp%d" % n for n in range(1, 6)}
    assert len(others) == 4 and ("lab/app4 …" in document.text) == more
    assert "lab/app0@%s…\n" % digest[:19] in document.text and digest in document.text


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
    assert "curl -fsS %s/use/docker.sh | sudo sh" % registry.url in text
    assert "curl -fsS '%s/use/podman.sh?mirror' | sudo sh" % registry.url in text
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


def show(store, target, access=None):
    """A page as a Document; its text has no empty lines."""
    answer = dispatch(store, access or Access("pull"), Request("GET", target))
    assert answer.status == 200, answer.body
    return Document(answer.body.decode())


def links_to(document, key):
    """The values of a parameter in the links of a page, in their order."""
    queries = [urllib.parse.parse_qs(urllib.parse.urlsplit(link["href"]).query) for link in document.all("a")]
    return [query[key][0] for query in queries if key in query and len(query) == 1 + (key == "reference")]


def date(store, name, tag, age):
    """Let a tag have been pushed so many seconds ago."""
    path = os.path.join(store.layout.current_path(name, tag), "link")
    os.utime(path, (time.time() - age,) * 2)


def test_repositories_are_searched_and_paged(store, monkeypatch):
    monkeypatch.setattr(tinyreg, "ROWS", 5)
    for number in range(12):
        make_docker_image(store, "team%d/app" % number)
    seen, target, pages = [], "/", 0
    while target:
        document = show(store, target)
        seen += links_to(document, "repository")
        start = max(int(first) for first in re.findall("start=([0-9]+)", target + "start=0"))
        following = [link["href"][1:] for link in document.all("a") if "start=%d" % (start + 5) in link["href"]]
        target = following[0] if following else None
        pages += 1
    assert pages == 3 and seen == ["team%d/app" % number for number in range(12)]
    document = show(store, "/?q=TEAM1")
    assert document.all("input")[0]["value"] == "team1"
    assert "team1/app" in document.text and "team11/app" in document.text and "team2/app" not in document.text


def test_repositories_stand_by_their_origin_in_the_order_that_people_count_in(store):
    names = ["student2", "student10", "docker.io/library/alpine", "lab.example_5000/b", "team/app"]
    for age, name in enumerate(names):
        make_image(store, name)
        date(store, name, "latest", 1000 * (age + 1))
    date(store, "student10", "latest", 10)
    document = show(store, "/")
    assert links_to(document, "repository") == ["student2", "student10", "team/app"] + names[2:4]
    headings = re.findall("<h2>(.*?)</h2>", dispatch(store, Access("pull"), Request("GET", "/")).body.decode())
    assert headings == ["Pushed here", "docker.io", "lab.example_5000"]
    assert "16 minutes ago" in document.text and "33 minutes" not in document.text
    assert "./?order=newest" in [link["href"] for link in document.all("a")]
    text = show(store, "/?order=newest").text
    assert sorted(names, key=text.index) == ["student10", "student2"] + names[2:]


def test_a_search_keeps_its_place_on_the_way_to_an_image_and_back(store):
    make_image(store, "team/app", "1")
    make_image(store, "other", "1")
    searched = show(store, "/?q=app&order=newest")
    assert [field["value"] for field in searched.all("input")] == ["app", "newest"]
    target = next(link["href"][1:] for link in searched.all("a") if "reference=1" in link["href"])
    for _ in range(2):  # the image, then its repository
        document = show(store, target)
        back = [link["href"] for link in document.all("a") if "q=app" in link["href"]]
        assert back[0] == "./?q=app"
        target = back[-1][1:]
    assert "other" not in show(store, "/?q=app").text
    assert "No repository has “<b>” in its name" in show(store, "/?q=<b>").text


def test_an_empty_registry_says_how_to_fill_it(store):
    document = show(store, "/")
    assert "python3 tinyreg.py pull alpine" in document.text and "use" in [link["href"] for link in document.all("a")]


def sign(store, name, image, tagged):
    """Push a cosign signature of an image, under cosign's tag, or as a referrer of today's form."""
    if not tagged:
        return make_referrer(store, name, image, artifactType="application/vnd.dev.sigstore.bundle.v0.3+json",
                             annotations={"dev.sigstore.bundle.predicateType": "https://sigstore.dev/cosign/sign/v1"})
    push_blob(store, name, b"{}")
    document = image_document((), b"{}")
    document["layers"] = [descriptor(b"{}", "application/vnd.dev.cosign.simplesigning.v1+json")]
    push_blob(store, name, b"{}")
    manifest = to_manifest(document)
    store.put_manifest(name, manifest, [image.digest.replace(":", "-") + ".sig"])
    return manifest


def test_a_page_reads_little_of_what_is_about_its_images(store, monkeypatch):
    image, reads = make_image(store, "app"), []
    for number in range(5):
        make_referrer(store, "app", image, annotations={"long": "%d" % number * (1 << 20)})
    referrers = Directory.referrers
    monkeypatch.setattr(Directory, "referrers", lambda *words: map(
        lambda manifest: reads.append(1) or manifest, referrers(*words)))
    assert len(list(tinyreg.attached(store, "app", image.digest))) == 1 and len(reads) == 2


@pytest.mark.parametrize("tagged", [True, False])
def test_signatures_are_on_the_image_that_they_sign(store, tagged):
    image = make_image(store, "app", "1.0")
    signature = sign(store, "app", image, tagged)
    make_referrer(store, "app", image, artifactType="application/spdx+json")
    front, tags = show(store, "/"), show(store, "/?repository=app")
    assert "sha256-" not in front.text + tags.text and links_to(front, "reference") == ["1.0"]
    assert "SBOM, signature" in tags.text and "1 tag" in tags.text
    page = show(store, "/?repository=app&reference=1.0")
    assert signature.digest in links_to(page, "reference") and "signature" in page.text
    its_own = show(store, "/?repository=app&reference=" + (
        image.digest.replace(":", "-") + ".sig" if tagged else signature.digest))
    assert image.digest in links_to(its_own, "reference")
    store.delete_manifest("app", image.digest)
    if tagged:  # what is about nothing that is here can be seen all the same
        assert "sha256-" in show(store, "/?repository=app").text


def test_a_tag_tells_what_it_has_pointed_to(store):
    images = [make_image(store, "app", "1", (layer,)) for layer in (b"a", b"b", b"c")]
    date(store, "app", "1", 5 * 86400)
    store.delete_manifest("app", images[0].digest)
    page = show(store, "/?repository=app&reference=1")
    text = page.text.partition("What this tag has pointed to")[2]
    assert [digest in text for digest in (image.digest for image in images)] == [True, True, True]
    assert images[0].digest + ", deleted since" in text and "5 days ago" in text
    assert links_to(page, "reference") == [images[2].digest, images[1].digest]
    make_image(store, "app", "2")
    assert "What this tag" not in show(store, "/?repository=app&reference=2").text


def test_a_config_is_written_as_people_read_it(store):
    config = {"os": "linux", "architecture": "amd64", "config": {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $HOME"], "WorkingDir": "/srv", "Tty": False,
        "ExposedPorts": {"80/tcp": {}}, "Labels": {"a": "b"}},
        "history": [{"created_by": "/bin/sh -c #(nop) ADD file:1 in / "}, {"created_by": "/bin/sh -c #(nop)  CMD []",
                    "empty_layer": True}, {"created_by": "RUN /bin/sh -c make # buildkit"}]}
    make_image(store, "app", "1", config=json.dumps(config).encode())
    text = show(store, "/?repository=app&reference=1").text
    for words in ("/bin/sh -c 'echo $HOME'", "Working Dir/srv", "Exposed Ports80/tcp\n", "a=b", "RUN make", "CMD []"):
        assert words in text, words
    assert "#(nop)" not in text and "buildkit" not in text and "Tty" not in text


def push_files(store, name, tag, files, config=b"{}", config_type="application/vnd.oci.empty.v1+json",
               media_type="application/octet-stream"):
    """Push files as oras and helm do: {title: content}."""
    for content in [config] + list(files.values()):
        push_blob(store, name, content)
    layers = [descriptor(content, media_type, annotations={"org.opencontainers.image.title": title})
              for title, content in files.items()]
    store.put_manifest(name, to_manifest(dict(image_document((), config), config=descriptor(config, config_type),
                                              layers=layers)), [tag])


def test_files_are_listed_with_downloads(registry, store):
    push_files(store, "data/course", "week3", {"a folder/100% <b>.csv": b"1,2,3", "readme.pdf": b"PDF"})
    where = registry.url + "/?repository=data/course&reference=week3"
    document = Document(get(where).text)
    assert "a folder/100% <b>.csv" in document.text and "oras pull --plain-http" in document.text
    assert "docker pull" not in document.text and "Layers" not in document.text
    links = [link["href"] for link in document.all("a") if link["href"].startswith("files/")]
    assert [get(urllib.parse.urljoin(where, link)).body for link in links] == [b"1,2,3", b"PDF"]
    push_files(store, "data/course", "bad", {"../../etc/passwd": b"root"})
    document = Document(get(where.replace("week3", "bad")).text)  # no file, but a layer all the same
    assert "passwd" not in document.text.partition("Layers")[0] and "files/" not in str(document.elements)


def test_a_chart_tells_what_it_is(registry, store):
    config = {"name": "podinfo", "version": "6.7.1", "description": "A <i>chart</i>", "keywords": ["a", {"b": 1}]}
    push_files(store, "charts/podinfo", "6.7.1", {"": b"a chart"}, json.dumps(config).encode(),
               "application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")
    document = Document(get(registry.url + "/?repository=charts/podinfo&reference=6.7.1").text)
    assert "A <i>chart</i>" in document.text and not document.all("i")
    link, = [link["href"] for link in document.all("a") if link["href"].startswith("files/")]
    assert link.endswith("/podinfo-6.7.1.tgz") and get(registry.url + "/" + link).body == b"a chart"


def test_the_disk_page_tells_what_garbage_collection_would_free(store):
    make_image(store, "app", "1", (b"old" * 10000,))
    make_image(store, "app", "1", (b"new",))
    push_blob(store, "app", b"orphan" * 5000)
    text = show(store, "/disk").text
    freed = collect_garbage(store, untagged=True, dry_run=True).counts["bytes"]
    assert "%s untagged" % tinyreg.in_units(freed) in text and freed > 60000
    collect_garbage(store, untagged=True)
    os.unlink(store.layout.usage)
    assert "0 B untagged" in show(store, "/disk").text


def test_the_disk_page_is_shown_of_a_disk_that_is_read_only(store, monkeypatch):
    make_image(store, "app", "1", (b"old" * 10000,))
    make_image(store, "app", "1", (b"new",))

    def utime(*arguments, **named):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", utime)
    assert "0 B untagged" in show(store, "/disk").text  # what can't be known without a lock is not counted


def test_the_first_page_of_a_large_store_reads_no_manifest_and_measures_nothing(store, monkeypatch):
    for number in range(3):
        make_image(store, "team%d/app" % number)
    store.usage()
    with open(store.layout.usage) as file:
        usage = json.load(file)
    with open(store.layout.usage, "w") as file:
        json.dump(dict(usage, took=5.0), file)
    os.utime(store.layout.usage, (0, 0))
    for method in ("manifest", "manifests", "open_blob", "measure"):
        monkeypatch.setattr(store, method, None)
    for target in ("/", "/?order=newest", "/?q=team1"):
        assert "B" in show(store, target).text.partition("team1/app")[2]


def test_every_step_of_how_to_use_it_is_a_command_that_works(start_server, tmp_path):
    require("curl", "openssl")
    server = start_server(None, "--tls")
    port = server.host.partition(":")[2]
    context = ssl.create_default_context(cafile=server.root + "/tinyreg/tls/ca.crt")
    page = ask(server, "GET", "/use", context=context).text
    assert "docker" in page
    commands = [html.unescape(text) for text in re.findall("<pre>(.*?)</pre>", page, re.DOTALL)]
    fetch = next(text for text in commands if "docker.sh" in text and "mirror" not in text)
    assert fetch.endswith(" | sudo sh")
    done = subprocess.run(["sh", "-ec", commands[0] + "\n" + fetch.replace(" | sudo sh", "")], cwd=str(tmp_path),
                          stdout=subprocess.PIPE, universal_newlines=True, check=True)
    printed, _, script = done.stdout.partition("\n")
    assert printed.partition("=")[2] in page and len(printed) > 90
    assert script == ask(server, "GET", "/use/docker.sh", context=context).text and port in script


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


def test_a_page_says_that_something_is_not_there(registry):
    for query in "repository=no/such", "repository=lab/app&reference=no":  # as a link says that is older than its image
        answer = get(registry.url + "/?" + query)
        assert answer.status == 404 and "look among the\nrepositories." in Document(answer.text).text
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


class Browser:
    """Headless Chromium with one tab, driven through its DevTools protocol: JSON over two pipes."""

    def __init__(self, profile, log):
        # Chromium reads its descriptor 3 and writes to 4, so none of ours may have these numbers.
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in self.pipe_ends()]
        commands, self.commands, answers, written = pipes
        self.answers = os.fdopen(answers, "rb", buffering=0)
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&%d 4>&%d' % (commands, written), "chromium", CHROMIUM, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--remote-debugging-pipe", "--user-data-dir=%s" % profile], pass_fds=(commands, written), stderr=log)
        os.close(commands)
        os.close(written)
        self.unread, self.number, self.session = b"", 0, {}
        self.console = []  # what the page, or the browser about it, complained of
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Log", "Accessibility"):
            self.ask(domain + ".enable")

    @staticmethod
    def pipe_ends():
        for end in os.pipe() + os.pipe():
            yield end
            os.close(end)

    def read(self):
        """The next message."""
        while b"\0" not in self.unread:
            block = self.answers.read(1 << 20)
            assert block, "chromium has ended"
            self.unread += block
        message, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(message.decode())
        if message.get("method") == "Log.entryAdded":
            self.console.append(message["params"]["entry"]["text"])
        return message

    def ask(self, method, **params):
        """The result of a command."""
        self.number += 1
        message = dict({"id": self.number, "method": method, "params": params}, **self.session)
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url, width=1200, scheme="light"):
        """Load a page, in a window of this width, for a person who prefers light or dark."""
        self.change(width, scheme)
        self.ask("Page.navigate", url=url)
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def change(self, width, scheme):
        """Change the window, and what the person prefers."""
        self.resize(width, 900)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width, height):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)

    def run(self, script):
        """The value of an expression of JavaScript in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9)

    def take_picture(self, path):
        """The whole page as a PNG, at most 4000 pixels of it."""
        width, height = self.run("[innerWidth, document.documentElement.scrollHeight]")
        self.resize(width, min(height, 4000))
        with open(str(path), "wb") as file:
            file.write(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def end(self):
        self.process.kill()
        self.process.wait()
        self.answers.close()
        os.close(self.commands)


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with open(str(tmp_path / "chromium.log"), "w") as log:
        browser = Browser(tmp_path / "profile", log)
        yield browser
        browser.end()


# All texts and bars of which the contrast is too low (WCAG 2 AA: 1.4.3 and 1.4.11), as "ratio text".
CONTRAST = """(() => {
const numbers = color => color.match(/[0-9.]+/g).map(Number);
const light = color => { const [r, g, b] = numbers(color).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05) };
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if ((numbers(c)[3] ?? 1) > 0) return c } return "rgb(255, 255, 255)" };
const low = [];
let looked = 0;
for (const e of document.querySelectorAll("body *")) {
    const style = getComputedStyle(e);
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (own && e.getClientRects().length && !["SCRIPT", "STYLE"].includes(e.tagName)) {
        const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
        for (const color of [style.color, getComputedStyle(e, "::before").color]) {
            looked++;
            if (ratio(color, ground(e)) < (large ? 3 : 4.5)) low.push(ratio(color, ground(e)) + " " + e.textContent);
        }
    }
    if (e.tagName == "rect" && !e.matches(".free") && ratio(style.fill, ground(e.parentElement)) < 3)
        low.push(ratio(style.fill, ground(e.parentElement)) + " bar " + e.className.baseVal);
    if (["INPUT", "BUTTON"].includes(e.tagName) && e.type != "hidden" && !e.closest(".copy")
        && ratio(style.borderTopColor, ground(e.parentElement)) < 3) low.push("border of " + e.tagName);
}
return looked < 20 ? ["hardly anything to see"] : low })()"""


def fill_school(root):
    """A store as a class has it in the second week: images from elsewhere, signed ones, and thirty students."""
    store = Directory(str(root))
    fill(root)
    config = json.dumps(dict(CONFIG, author="The team", config={
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"], "Cmd": ["python3", "-m", "app"],
        "Labels": {"org.opencontainers.image.source": "https://git.example.org/team/app" + "/long" * 30}},
        history=[{"created_by": "/bin/sh -c #(nop) ADD file:%s in / " % ("5d673d25" * 8)},
                 {"created_by": "RUN apk add --no-cache " + "package " * 30}])).encode()
    image = make_image(store, "quay.io/prometheus/prometheus", "v2.53.0", (BASE, b"one"), config)
    sign(store, "quay.io/prometheus/prometheus", image, True)
    make_referrer(store, "quay.io/prometheus/prometheus", image, artifactType="application/spdx+json")
    make_image(store, "quay.io/prometheus/prometheus", "v2.53.0", (BASE, b"two"), config)
    long = "lab.example_5000/" + "/".join(["a-very-long-name-for-all-that-a-team-needs"] * 4)
    push_files(store, "data/course", "week3", {"measurements-of-%s.csv" % ("x" * 60): b"1,2,3", "readme.pdf": b"PDF"})
    make_image(store, long, "release-candidate-2026-11-20t10-11-12-" + "x" * 80, (BASE,))
    for number in range(30):
        make_image(store, "students/student%d" % number, "exercise-1", (BASE, b"%d" % number * 500))
    return [("repositories", ""), ("newest", "?order=newest"), ("nothing", "?q=nothing"),
            ("tags", "?repository=quay.io/prometheus/prometheus"),
            ("long", "?repository=" + long), ("image", "?repository=quay.io/prometheus/prometheus&reference=v2.53.0"),
            ("files", "?repository=data/course&reference=week3"),
            ("attack", PAGES[4]), ("index", PAGES[5]), ("use", "use"), ("disk", "disk"), ("live", "live")]


def test_every_page_fits_the_screen_and_can_be_read_light_and_dark(start_server, browser, tmp_path, no_fsync):
    """The pictures stay in pytest's folder: NAME-WIDTH-SCHEME.png."""
    pages = fill_school(tmp_path / "registry")
    server = start_server(tmp_path / "registry", "--log", "explain", "--workers", "1")
    for name, target in pages:
        browser.open("%s/%s" % (server.url, target))
        for width, scheme in ((1200, "light"), (400, "dark"), (400, "light"), (1200, "dark")):
            place = "%s-%d-%s" % (name, width, scheme)
            browser.change(width, scheme)
            assert browser.run("document.documentElement.scrollWidth") == width, place
            assert browser.run(CONTRAST) == [], place
            if (width, scheme) in ((1200, "light"), (400, "dark")) or name == "image":
                browser.take_picture(tmp_path / (place + ".png"))
        roles = {node["role"]["value"] for node in browser.ask("Accessibility.getFullAXTree")["nodes"]
                 if not node["ignored"]}
        assert roles >= {"banner", "navigation", "main", "contentinfo", "heading"}, name
        assert browser.run("document.querySelectorAll('nav [aria-current]').length") == 1, name
    assert browser.console == []
    assert len(list(tmp_path.glob("*.png"))) == 2 * len(pages) + 2


def test_a_page_can_be_used_with_the_keyboard_alone(registry, browser):
    browser.open(registry.url + "/?repository=lab/app")
    texts = []
    for _ in range(40):
        browser.press("Tab")
        text, is_seen = browser.run(
            "(() => { const e = document.activeElement, r = e.getBoundingClientRect();"
            "return [e.textContent, r.left >= 0 && getComputedStyle(e).outlineStyle == 'solid'] })()")
        texts.append(text)
        if text.endswith("take it with you"):
            break
        assert is_seen, text
    assert texts[:3] == ["Skip to the content", "Repositories", "How to use it"]
    assert "1.0" in texts and "Copy" in texts and texts[-1] == "take it with you"


def test_chromium_runs_our_script_and_nobody_elses(registry, browser):
    browser.open(registry.url + "/?repository=lab/app&reference=1.0")
    assert browser.console == []  # where it would say what the Content-Security-Policy refused
    assert browser.run("document.title") == "lab/app:1.0 – tinyreg"  # and not "attacked"
    buttons = browser.run("[...document.querySelectorAll('button')].map(b => b.textContent + b.hidden)")
    assert len(buttons) > 4 and set(buttons) == {"Copyfalse"}  # our script showed them
    browser.run("document.querySelector('button').click()")
    assert browser.run("document.querySelector('button').textContent") == "Copied"
    assert browser.run("getSelection().toString()").startswith("sha256:")


# /live in the browser

SHOWN = """[...document.querySelectorAll("#live section")].filter(b => !b.hidden).map(
    b => [b.firstChild.textContent, [...b.querySelectorAll("p")].filter(p => !p.hidden).map(
        p => p.className + p.textContent.slice(8))])"""


def test_live_has_a_block_for_each_client_and_a_class_stays_readable(registry, browser, tmp_path):
    """Thirty students at once; then one of them alone; paused, nothing moves, and nothing is lost."""
    def state():
        return browser.run("document.querySelector('[role=status]').textContent")

    def pull(number, tag="1.0"):
        answer = registry.ask("GET", "/v2/lab/app/manifests/" + tag, x_forwarded_for="10.0.0.%d" % number,
                              user_agent="docker/28 go")
        return answer.status

    browser.open(registry.url + "/live")
    until(lambda: state() == "connected, waiting")
    for number in range(1, 31):
        assert (pull(number), pull(number, "none")) == (200, 404)
    until(lambda: sum(len(lines) for _, lines in browser.run(SHOWN)) == 60)
    assert {who for who, _ in browser.run(SHOWN)} == {"docker/28 at 10.0.0.%d" % number for number in range(1, 31)}
    assert len(browser.run(SHOWN)) == 30
    for _, lines in browser.run(SHOWN):
        good, no = sorted(lines)
        assert good.startswith("good the manifest lab/app:1.0, please") and "-> 200: here it is" in good
        assert no.startswith("no the manifest lab/app:none") and no.endswith("404: that is not here")
    assert state() == "connected"
    for width, scheme in ((1200, "light"), (400, "dark")):
        browser.change(width, scheme)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run(CONTRAST) == []
        browser.take_picture(tmp_path / ("class-%d-%s.png" % (width, scheme)))

    def find(words):
        browser.run("(e => { e.value = %s; e.oninput() })(document.getElementById('only'))" % json.dumps(words))
        return [(who, len(lines)) for who, lines in browser.run(SHOWN)]

    assert find("10.0.0.7 ") == [("docker/28 at 10.0.0.7", 2)]
    assert len(find("LAB/APP:none")) == 30 and find("lab/app:none 10.0.0.7 ") == [("docker/28 at 10.0.0.7", 1)]
    assert find("of-nobody") == [] and len(find("")) == 30
    browser.run("document.querySelector('.tools button').click()")
    pull(31)
    until(lambda: state() == "connected, paused: 1 to be shown")
    assert len(browser.run(SHOWN)) == 30
    browser.run("document.querySelector('.tools button').click()")
    assert len(browser.run(SHOWN)) == 31 and state() == "connected"
    registry.stop()
    until(lambda: state() == "not connected; trying again")
