"""What a mirror's operator needs of pull, push, load and save: many images at once, and reruns that cost little."""

import json
import threading

import pytest

import tinyreg
from conftest import PATIENCE, run_tinyreg
from registries import needs_distribution
from samples import make_image, make_referrer
from test_copy import make_multi
from tinyreg import Directory, Remote, copy, fallback_tag


@pytest.fixture
def there(server, no_fsync):
    """The store of a registry that images are pulled from."""
    return Directory(server.root)


def pull(tmp_path, *words, status=0):
    """Run pull into a store of the test; returns its CompletedProcess."""
    done = run_tinyreg("pull", "--root", tmp_path / "back", *words)
    assert done.returncode == status, done.stderr
    return done


def referrers(done):
    """{image: how many referrers went along} of what pull --json says."""
    return {entry["image"].partition("/")[2]: len(entry["referrers"]) for entry in json.loads(done.stdout)["images"]}


def sign(store, name, subject, tag=None):
    """As cosign does, with a tag made of the subject's digest; or as a referrer."""
    if not tag:
        return make_referrer(store, name, subject, artifactType="application/vnd.dev.sigstore.bundle")
    return make_image(store, name, fallback_tag(subject.digest) + tag, layers=(subject.digest.encode(),))


def test_a_rerun_costs_three_requests_an_image_and_sees_what_was_signed_meanwhile(there, server, start_proxy, tmp_path):
    """An index has many children, and each may have signatures: the index's own list tells of news."""
    tops = [make_multi(there, "many", str(number), ("amd64-%d" % number, "arm64-%d" % number)) for number in range(3)]
    for name in "one", "two":
        sign(there, name, make_image(there, name, "1", layers=(name.encode(),)))
    proxy = start_proxy(server.host)
    images = ["%s/many:%d" % (proxy.host, number) for number in range(3)]
    images += [proxy.host + "/one:1", proxy.host + "/two:1"]
    pull(tmp_path, *images)
    proxy.seen.clear()
    assert "copied 0 B in 0 blobs" in pull(tmp_path, *images).stdout
    assert len(proxy.seen) == 2 * len(images) + len({"many", "one", "two"})
    # Both kinds of signatures, of an index and of its child; and one of an image that had one.
    top, children = tops[1]
    for subject in top, children[0]:
        sign(there, "many", subject)
    sign(there, "many", tops[2][1][0], ".sig")
    sign(there, "two", make_image(there, "two", "1", layers=(b"two",)))
    make_referrer(there, "two", there.manifest("two", there.resolve("two", "1")), artifactType="text/another")
    assert referrers(pull(tmp_path, "--json", *images)) == {
        "many:0": 0, "many:1": 2, "many:2": 1, "one:1": 1, "two:1": 2}
    assert Directory(str(tmp_path / "back")).resolve(
        proxy.host.replace(":", "_") + "/many", fallback_tag(tops[2][1][0].digest) + ".sig")


def test_a_platform_that_comes_later_brings_its_signatures_along(there, server, tmp_path):
    top, children = make_multi(there, "app", "1")
    for child in children[:2]:
        sign(there, "app", child)
    image = server.host + "/app:1"
    assert referrers(pull(tmp_path, "--json", "--platform", "linux/amd64", image)) == {"app:1": 1}
    assert referrers(pull(tmp_path, "--json", image)) == {"app:1": 2}


def test_one_login_opens_all_repositories_of_a_registry(there, server, start_proxy, tmp_path, monkeypatch):
    """A rerun asks no registry three times what it has answered once: that it wants a login."""
    def spoil(handler):
        if "Authorization" not in handler.headers:
            refused.append(handler.path)
            return handler.answer(401, {"WWW-Authenticate": 'Basic realm="x"'})

    refused = []
    host = start_proxy(server.host, spoil).host
    names = ["app%d" % number for number in range(3)]
    for name in names:
        make_image(there, name, "1")
    (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    pull(tmp_path, "--jobs", "1", *["%s/%s:1" % (host, name) for name in names])
    assert len(refused) == 1


@needs_distribution
def test_a_rerun_costs_no_more_at_a_registry_that_has_no_referrers_api(store, distribution, start_proxy, tmp_path):
    make_multi(store, "many", "1")
    signed = make_image(store, "one", "1")
    make_referrer(store, "one", signed, artifactType="text/plain")
    copy(store, Remote(distribution), "many", "1")
    copy(store, Remote(distribution), "one", "1")
    proxy = start_proxy(distribution)
    images = [proxy.host + "/many:1", proxy.host + "/one:1"]
    assert referrers(pull(tmp_path, "--json", *images)) == {"many:1": 0, "one:1": 1}
    proxy.seen.clear()
    assert referrers(pull(tmp_path, "--json", *images[:1])) == {"many:1": 0}
    assert [method for method, _, _ in proxy.seen] == ["HEAD", "GET", "GET"]
    make_referrer(store, "many", store.manifest("many", store.resolve("many", "1")), artifactType="text/plain")
    copy(store, Remote(distribution), "many", "1")
    assert referrers(pull(tmp_path, "--json", *images)) == {"many:1": 1, "one:1": 1}


@pytest.mark.parametrize("listing", [
    lambda path: (404, {}, {}),
    lambda path: (200, {"Link": '<%s1>; rel="next"' % path}, {"tags": ["1"]})])
def test_where_the_list_of_tags_is_missing_or_long_each_tag_is_asked_for(there, server, start_proxy, tmp_path, listing):
    sign(there, "app", make_image(there, "app", "1"), ".sig")

    def spoil(handler):
        if "/tags/list" in handler.path:
            status, headers, document = listing(handler.path)
            return handler.answer(status, headers, json.dumps(document).encode())

    proxy = start_proxy(server.host, spoil)
    assert referrers(pull(tmp_path, "--json", proxy.host + "/app:1")) == {"app:1": 1}
    assert len(proxy.asked("GET", "/tags/list")) <= tinyreg.MAX_TAG_PAGES


def test_images_are_planned_and_copied_at_once_and_told_of_in_their_order(there, server, start_proxy, tmp_path):
    """The first image's answers come only after the second one's."""
    waits = {part: threading.Event() for part in ("/manifests/", "/blobs/")}

    def spoil(handler):
        for part, event in waits.items():
            if part in handler.path and "/second/" in handler.path:
                event.set()
            elif part in handler.path and "/first/" in handler.path:
                assert event.wait(PATIENCE)

    for name in "first", "second":
        make_image(there, name, "1", layers=(name.encode(),), config=b'{"os":"%s"}' % name.encode())
    host = start_proxy(server.host, spoil).host
    done = pull(tmp_path, host + "/first:1", host + "/gone:1", host + "/second:1", "--jobs", "4", status=1)
    assert [line.partition(":1: ")[0] for line in done.stdout.splitlines()[:2]] == [host + "/first", host + "/second"]
    reason = "%s/gone:1: %s has no gone:1; check its name and tag" % (host, host)
    assert done.stderr.splitlines() == [
        "tinyreg: " + reason, "tinyreg: 1 of 3 images failed; it is said above why"]


def test_a_layer_that_images_share_is_fetched_once_whoever_is_first(there, server, start_proxy, tmp_path):
    """The first fetch of it fails for good; an image that waits for it takes it over."""
    names = ["app%d" % number for number in range(4)]
    for name in names:
        shared = make_image(there, name, "1", layers=(b"shared", name.encode())).blobs[1].digest
    failed = []

    def spoil(handler):
        if shared in handler.path and not failed:
            failed.append(handler.path)
            return handler.answer(403)

    proxy = start_proxy(server.host, spoil)
    done = pull(tmp_path, "--jobs", "4", *[proxy.host + "/" + name + ":1" for name in names], status=1)
    assert done.stdout.count(": sha256:") == 3 and "1 of 4 images failed" in done.stderr
    assert len(proxy.asked("GET", shared)) == 2


def test_connections_are_used_again_also_after_a_blob(there, server, start_proxy, tmp_path):
    make_image(there, "app", "1", layers=[b"layer %d" % number for number in range(5)])
    connections = set()
    proxy = start_proxy(server.host, lambda handler: connections.add(handler.client_address))
    pull(tmp_path, proxy.host + "/app:1", "--jobs", "1")
    assert len(proxy.asked("GET", "/blobs/")) == 6 and len(connections) == 1


def test_plans_that_memory_has_no_room_for_are_made_again(there, server, tmp_path, monkeypatch, capsys):
    """Of a list of a thousand images not all manifests are held at once."""
    images = ["%s/app%d:1" % (server.host, number) for number in range(3)]
    for number, image in enumerate(images):
        sign(there, "app%d" % number, make_image(there, "app%d" % number, "1", layers=(image.encode(),)))
    sizes = []
    monkeypatch.setattr(tinyreg, "MAX_PLANS", 3000)  # of two manifests, with what they cost
    monkeypatch.setattr(tinyreg.Transfer, "_copy", lambda transfer, copy, inner=tinyreg.Transfer._copy: (
        sizes.append(sum(len(work.manifests) for work in transfer.copies)), inner(transfer, copy)))
    assert tinyreg.main(["pull", "--root", str(tmp_path / "back"), "--jobs", "1", "--json"] + images) == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(entry["referrers"]) for entry in report["images"]] == [1, 1, 1]
    assert [entry["complete"] for entry in report["images"]] == [True] * 3
    assert max(sizes) == 2


def test_few_pulls_that_are_left_are_told_of_once(there, server, start_proxy, tmp_path):
    """As Docker Hub says it."""
    make_image(there, "app", "1")
    left = ["76", "19", "9", "8"]

    def spoil(handler):
        if handler.command == "HEAD" and "/manifests/" in handler.path:
            headers = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": left.pop(0) + ";w=21600",
                       "Docker-Content-Digest": there.resolve("app", "1")}
            return handler.answer(200, headers)

    host = start_proxy(server.host, spoil).host
    assert pull(tmp_path, host + "/app:1").stderr == ""
    done = pull(tmp_path, host + "/app:1@" + there.resolve("app", "1"), host + "/app:1", "--jobs", "1")
    assert done.stderr.splitlines() == [
        "%s lets us pull 19 more manifests; its limit is 100;w=21600 (w is seconds)" % host]


# Pins

def test_a_lock_names_what_was_copied_and_pull_takes_these_bytes_again(there, server, tmp_path):
    lock, host = tmp_path / "images.lock", server.host
    old = {name: make_image(there, name, "1", layers=(name.encode(),)).digest for name in ("b", "a")}
    pull(tmp_path, host + "/b:1", host + "/a:1", host + "/a@" + old["a"], "--dry-run", "--lock", lock)
    assert not lock.exists()
    pull(tmp_path, host + "/b:1", host + "/a:1", host + "/a@" + old["a"], "--lock", lock)
    pins = sorted(["%s/a:1@%s" % (host, old["a"]), "%s/a@%s" % (host, old["a"]), "%s/b:1@%s" % (host, old["b"])])
    assert lock.read_text().splitlines() == pins
    make_image(there, "a", "1", layers=(b"moved",))
    far = tmp_path / "far"
    again = tmp_path / "again.lock"
    done = run_tinyreg("pull", "-f", lock, "--root", far, "--lock", again)
    assert done.returncode == 0 and "the tag 1 has moved" in done.stderr
    assert Directory(str(far)).resolve(host.replace(":", "_") + "/a", "1") == old["a"]
    assert again.read_bytes() == lock.read_bytes()
    # The store's names have no colon; the lock's have one, wherever it is written.
    for words in ["save", "-f", lock, "-o", tmp_path / "images.tar"], ["load", tmp_path / "images.tar"]:
        again.unlink()
        done = run_tinyreg(*words, "--root", far, "--lock", again)
        assert done.returncode == 0, done.stderr
        assert again.read_text().splitlines() == [pins[0], pins[2]] if words[0] == "load" else pins


def test_a_lock_has_only_what_was_copied_and_says_so(there, server, tmp_path):
    lock = tmp_path / "images.lock"
    digest = make_image(there, "a", "1").digest
    done = pull(tmp_path, server.host + "/gone:1", server.host + "/a:1", "--lock", lock, status=1)
    assert lock.read_text() == "%s/a:1@%s\n" % (server.host, digest)
    assert "tinyreg: 1 of 2 images failed, and are not in %s; " % lock in done.stderr
    pull(tmp_path, server.host + "/gone:1", "--lock", lock, status=1)
    assert lock.read_text()  # where nothing was copied, an older lock stays
    done = pull(tmp_path, server.host + "/a:1", "--lock", tmp_path / "missing" / "lock", status=2)
    assert "can't be written" in done.stderr and len(done.stderr.splitlines()) == 1


# Names

@pytest.mark.parametrize("rename, name, new", [
    (["quay.io=mirror"], "quay.io/a/b", "mirror/a/b"), (["quay.io=mirror"], "quay.io.example/a", "quay.io.example/a"),
    (["quay.io=x", "quay.io/a=y"], "quay.io/a/b", "y/b"), (["quay.io/a=y", "quay.io=x"], "quay.io/ab/c", "x/ab/c"),
    (["quay.io/a/b=c/d"], "quay.io/a/b", "c/d"), (["docker.io/="], "docker.io/library/a", "library/a"),
    (["lab.example:5000/x=y"], "lab.example_5000/x/z", "y/z"), (["a=lab.example:5000"], "a/z", "lab.example_5000/z")])
def test_the_longest_beginning_is_renamed_in_whole_components(rename, name, new):
    assert tinyreg.renamed(name, [tinyreg.parse_rename(text) for text in rename]) == new


def test_a_rename_that_is_none_is_a_usage_error(tmp_path):
    for rename in "a", "=b", "a/B=c", "a=b=c", "a//b=c", "a=../b", "=":
        with pytest.raises(tinyreg.CommandError, match="is no FROM=TO"):
            tinyreg.parse_rename(rename)
    done = pull(tmp_path, "alpine", "--rename", "a", status=2)
    assert len(done.stderr.splitlines()) == 1 and "'a' is no FROM=TO" in done.stderr


def test_what_is_about_an_image_goes_along_under_its_new_name(there, server, start_server, tmp_path):
    """Through pull, push and load, and into another registry's namespace."""
    top, children = make_multi(there, "team/app", "1")
    sign(there, "team/app", top)
    sign(there, "team/app", children[0], ".sig")
    origin = server.host.replace(":", "_")
    pull(tmp_path, server.host + "/team/app:1", "--rename", server.host + "/team=base")
    back = Directory(str(tmp_path / "back"))
    assert list(back.repositories()) == ["base/app"]
    tags = ["1", fallback_tag(children[0].digest) + ".sig"]
    assert list(back.tags("base/app")) == tags and len(back.referrer_digests("base/app", top.digest)) == 1
    other = start_server(tmp_path / "other")
    words = ["--to", other.host + "/mirror", "--rename", "base=x/y"]
    assert run_tinyreg("push", "base/app:1", "--root", back.root, *words).returncode == 0
    archive = tmp_path / "images.tar"
    assert run_tinyreg("save", "base/app:1", "--root", back.root, "-o", archive).returncode == 0
    assert run_tinyreg("load", archive, "--root", other.root, "--rename", "base/app=" + origin).returncode == 0
    far = Directory(other.root)
    for name in "mirror/x/y/app", origin:
        assert list(far.tags(name)) == tags and len(far.referrer_digests(name, top.digest)) == 1


def test_two_images_under_one_name_are_an_error_before_anything_is_copied(there, server, tmp_path):
    for name in "one/app", "two/app":
        make_image(there, name, "1")
    images = [server.host + "/one/app:1", server.host + "/two/app:1"]
    renames = ["--rename", server.host + "/one=x", "--rename", server.host + "/two=x"]
    done = pull(tmp_path, *images + renames, status=1)
    assert "would both become x/app:1" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(Directory(str(tmp_path / "back")).repositories()) == []
    make_image(there, "two/app", "2")
    pull(tmp_path, images[0], server.host + "/two/app:2", *renames)
    assert list(Directory(str(tmp_path / "back")).tags("x/app")) == ["1", "2"]


@pytest.mark.parametrize("prefix", ["", "/proxy-docker"])
def test_docker_io_s_images_come_from_a_mirror_and_keep_their_names(there, server, tmp_path, prefix):
    """From a plain mirror, or from a project of Harbor."""
    digest = make_image(there, prefix.lstrip("/") + "/library/alpine" if prefix else "library/alpine", "3").digest
    lock = tmp_path / "lock"
    done = pull(tmp_path, "alpine:3", "--via", server.host + prefix, "--lock", lock, "--rename", "alpine=base")
    assert done.stderr == "tinyreg: --rename alpine=base: no name begins so; the first is docker.io/library/alpine\n"
    assert done.stdout.startswith("docker.io/library/alpine:3: ")
    assert Directory(str(tmp_path / "back")).resolve("docker.io/library/alpine", "3") == digest
    assert lock.read_text() == "docker.io/library/alpine:3@%s\n" % digest


# Rate

def test_a_rate_holds_for_all_transfers_together(there, server, tmp_path, monkeypatch):
    """On a clock that stands still, the longest wait is the time that all bytes may take."""
    layers = [b"%d" % number * 50000 for number in range(4)]
    images = []
    for number in range(2):
        manifest = make_image(there, "app%d" % number, "1", layers=layers[number * 2:number * 2 + 2])
        images.append("%s/app%d:1" % (server.host, number))
    waits = []
    monkeypatch.setattr(tinyreg.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(tinyreg.time, "sleep", waits.append)
    words = ["--root", str(tmp_path / "back"), "--rate", "10000B", "--quiet"]
    assert tinyreg.main(["pull"] + words + images) == 0
    total = sum(map(len, layers)) + manifest.blobs[0].size
    assert max(waits) == pytest.approx(total / 10000.0) and len(waits) >= total / 4096
    waits.clear()
    names = [image.replace(":", "_", 1) for image in images]
    assert tinyreg.main(["push"] + words + ["--to", server.host + "/x"] + names) == 0
    assert max(waits) == pytest.approx(total / 10000.0)
