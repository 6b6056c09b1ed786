"""Several processes on one root: two servers, the command line and gc, and no update lost."""

import json
import threading
import urllib.request

from conftest import run_tinyreg
from samples import CONFIG, image
from test_crash import Client, check_store
from tinyreg import Digest, Directory


def test_two_servers_the_command_line_and_gc_on_one_directory(start_server, tmp_path):
    root = tmp_path / "registry"
    servers = [start_server(root), start_server(root)]
    base = json.dumps(image((b"base",))).encode()
    about = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest.of(base), "size": len(base)}
    client = Client(servers[0].port)
    assert [client.push_blob("app", part) for part in (b"base", CONFIG)] == [201, 201]
    assert client.push_manifest("app", "base", base) == 201
    referrers, failures = [], []

    def push(number):
        try:
            client = Client(servers[number % 2].port)
            for serial in range(12):
                layer = b"layer %d" % (serial % 4)
                content = json.dumps(image((layer,), subject=about, artifactType="application/x",
                                           annotations={"n": "%d %d" % (number, serial)})).encode()
                for part in (layer, CONFIG):
                    assert client.push_blob("app", part) == 201
                assert client.push_manifest("app", "%d-%d" % (number, serial), content) == 201
                assert client.push_manifest("app", "gone-%d-%d" % (number, serial), content) == 201
                referrers.append(Digest.of(content))
                # Reads through the other server see it at once.
                other = Client(servers[1 - number % 2].port)
                shown = json.loads(other.ask("GET", "/v2/app/referrers/" + Digest.of(base))[2].decode())
                assert Digest.of(content) in {entry["digest"] for entry in shown["manifests"]}
                other.connection.close()
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    removed = set()
    while any(thread.is_alive() for thread in threads):
        gone = [tag for tag in Directory(str(root)).tags("app") if tag.startswith("gone") and tag not in removed]
        if gone:
            assert run_tinyreg("rm", "--root", root, *["app:" + tag for tag in gone]).returncode == 0
            removed.update(gone)
        assert run_tinyreg("gc", "--root", root).returncode == 0
    assert not failures
    for server in servers:
        with urllib.request.urlopen(server.url + "/v2/app/tags/list") as answer:
            tags = json.loads(answer.read().decode())["tags"]
        assert {"%d-%d" % (number, serial) for number in range(4) for serial in range(12)} <= set(tags)
        assert not removed.intersection(tags)
        with urllib.request.urlopen(server.url + "/v2/app/referrers/" + Digest.of(base)) as answer:
            shown = json.loads(answer.read().decode())["manifests"]
        assert sorted(entry["digest"] for entry in shown) == sorted(referrers)
    assert len(check_store(Directory(str(root)))) >= 49
