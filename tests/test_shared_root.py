"""Several processes on one root: two servers, the command line and gc, and no update lost."""

import json
import threading

from conftest import Client, run_tinyreg
from samples import CONFIG, image
from test_crash import check_store, put_manifest
from tinyreg import Digest, Directory


def test_two_servers_the_command_line_and_gc_on_one_directory(start_server, tmp_path):
    root = tmp_path / "registry"
    servers = [start_server(root), start_server(root)]
    base = json.dumps(image((b"base",))).encode()
    about = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest.of(base), "size": len(base)}
    client = Client(servers[0])
    assert [client.upload("app", part).status for part in (b"base", CONFIG)] == [201, 201]
    assert put_manifest(client, "app", "base", base) == 201
    referrers, failures = [], []

    def push(number):
        try:
            client = Client(servers[number % 2])
            for serial in range(12):
                layer = b"layer %d" % (serial % 4)
                content = json.dumps(image((layer,), subject=about, artifactType="application/x",
                                           annotations={"n": "%d %d" % (number, serial)})).encode()
                for part in (layer, CONFIG):
                    assert client.upload("app", part).status == 201
                assert put_manifest(client, "app", "%d-%d" % (number, serial), content) == 201
                assert put_manifest(client, "app", "gone-%d-%d" % (number, serial), content) == 201
                referrers.append(Digest.of(content))
                # Reads through the other server see it at once.
                other = Client(servers[1 - number % 2])
                shown = other.referrers("app", Digest.of(base))
                assert Digest.of(content) in shown
                other.close()
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
        with Client(server) as client:
            tags, shown = client.tags("app"), client.referrers("app", Digest.of(base))
        assert {"%d-%d" % (number, serial) for number in range(4) for serial in range(12)} <= set(tags)
        assert not removed.intersection(tags)
        assert sorted(shown) == sorted(referrers)
    assert len(check_store(Directory(str(root)))) >= 49
