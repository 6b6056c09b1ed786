"""Server, TLS: the certificates that serve makes, raw bytes and wrong protocols on its port, client certificates."""

import base64
import calendar
import hashlib
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import time

import pytest
from conftest import PATIENCE, Client, Server, by_digest, found_pythons, run_tinyreg, until
from samples import make_image, push_blob

import tinyreg
from tinyreg import Certificates, Directory, Files, host_names, make_certificates

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="not installed: openssl")


def openssl(*arguments, **settings):
    return subprocess.run(["openssl"] + [str(word) for word in arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, check=settings.pop("check", True),
                          **settings).stdout


def files_of(tmp_path):
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return Files(str(tmp_path / "scratch"))


def trusting(server, certificate=None):
    """A client's context that trusts the server's CA, and nothing else."""
    context = ssl.create_default_context(cafile=os.path.join(server.root, "tinyreg", "tls", "ca.crt"))
    if certificate:
        context.load_cert_chain(certificate)
    return context


class Talk(Client):
    """A Client that is connected at once, over TLS if there is a context, and calls the server localhost.

    Its certificate has to be valid for `name`."""

    def __init__(self, server, context=None, name="localhost"):
        super().__init__("http://127.0.0.1:%d" % server.port)
        self.connection.connect()
        if context:
            self.connection.sock = context.wrap_socket(self.connection.sock, server_hostname=name)

    def ask(self, method, target, body=None, **headers):
        return super().ask(method, target, body, host="localhost", **headers)


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    """One for all tests that only ask; with a repository of a few blobs."""
    root = tmp_path_factory.mktemp("tls") / "registry"
    store = Directory(str(root))
    make_image(store, "app")
    server = Server(root, "--tls", "--tls-name", "registry.lab", "--workers", "2")
    server.large = os.urandom(5 << 20)
    server.digest = push_blob(store, "app", server.large)
    yield server
    server.stop()


# Certificates

@pytest.mark.parametrize("name", ["registry.lab:5000", "10.0.0.7:5000", "https://registry.lab", "300.1.1.1"])
def test_a_name_with_a_port_or_a_scheme_is_refused_in_one_line(tmp_path, name):
    done = run_tinyreg("serve", "--root", tmp_path / "root", "--listen", "127.0.0.1:0", "--tls", "--tls-name", name)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "'%s' is no name or address to make a certificate for; write it without" % name in done.stderr


def test_certificates_are_what_go_and_apple_clients_want(tmp_path):
    folder = tmp_path / "tls"
    names = {"registry.lab", "registry", "192.0.2.7", "2001:db8::7"}
    make_certificates(files_of(tmp_path), str(folder), names)
    assert openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", folder / "ca.crt",
                   folder / "server.pem").strip().endswith("OK")
    for name, option in [("registry.lab", "-checkhost"), ("registry", "-checkhost"), ("192.0.2.7", "-checkip"),
                         ("2001:db8::7", "-checkip")]:
        assert "does match" in openssl("x509", "-noout", option, name, "-in", folder / "server.pem")
    assert "does NOT match" in openssl("x509", "-noout", "-checkhost", "other", "-in", folder / "server.pem")
    shown = openssl("x509", "-noout", "-text", "-in", folder / "ca.crt")
    assert re.search(r"Basic Constraints: critical\s+CA:TRUE, pathlen:0\s", shown)
    assert re.search(r"Key Usage: critical\s+Certificate Sign, CRL Sign\s", shown)
    days = int(openssl("x509", "-noout", "-checkend", 398 * 86400, "-in", folder / "server.pem", check=False) == "")
    assert not days, "Apple's clients trust no certificate for longer than 398 days"
    assert {name: os.stat(str(folder / name)).st_mode & 0o777 for name in ("ca.key", "server.pem")} == {
        "ca.key": 0o600, "server.pem": 0o600}
    assert sorted(os.listdir(str(folder))) == ["ca.crt", "ca.key", "server.pem"]
    assert os.listdir(str(tmp_path / "scratch")) == []


def test_certificates_are_made_anew_when_they_must_be_and_the_ca_stays(tmp_path, monkeypatch):
    folder = tmp_path / "tls"

    def contents(names):
        make_certificates(files_of(tmp_path), str(folder), names)
        return (folder / "ca.crt").read_bytes(), (folder / "server.pem").read_bytes()

    ca, first = contents({"a"})
    assert contents({"a"}) == (ca, first)
    assert contents({"a", "b"})[0] == ca
    second = contents({"a", "b"})[1]
    assert second != first
    monkeypatch.setattr(tinyreg, "RENEW_DAYS", 400)  # the certificate ends before that
    third = contents({"a", "b"})
    assert third[0] == ca and third[1] != second
    monkeypatch.setattr(tinyreg, "RENEW_DAYS", 60)
    os.unlink(str(folder / "ca.crt"))                # as a crash between key and certificate would leave it
    fourth = contents({"a", "b"})
    assert fourth[0] != ca
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "server.pem").strip().endswith("OK")


def test_one_start_with_a_wrong_clock_takes_nothing_from_clients(tmp_path, monkeypatch):
    """In 2050, in 1970, and then right: the CA stays what clients trust, and is valid at any time."""
    folder, ca = tmp_path / "tls", None
    for year in (2026, 2050, 1970, 2026):
        now = calendar.timegm((year, 1, 2, 0, 0, 0))
        monkeypatch.setattr(time, "time", lambda now=now: now)
        make_certificates(files_of(tmp_path), str(folder), {"a"})
        ca = ca or (folder / "ca.crt").read_bytes()
        assert (folder / "ca.crt").read_bytes() == ca
        for moment in (now, now + 86400 * 300):
            assert openssl("verify", "-attime", moment, "-CAfile", folder / "ca.crt",
                           folder / "server.pem").strip().endswith("OK")


@pytest.mark.parametrize("days", [(-9, -2), (1, 7000)], ids=["expired", "not yet valid"])
def test_a_ca_that_is_not_valid_now_gets_other_dates_and_keeps_its_key(tmp_path, monkeypatch, days):
    """As a tinyreg before this one left them, with the clock wrong then or now."""
    folder = tmp_path / "tls"
    monkeypatch.setattr(tinyreg, "NO_END", time.time() + days[1] * 86400)
    monkeypatch.setattr(tinyreg, "certificate_date", lambda moment, real=tinyreg.certificate_date: real(
        moment or time.time() + days[0] * 86400))
    make_certificates(files_of(tmp_path), str(folder), {"a"})
    old = tmp_path / "old.crt"
    old.write_bytes((folder / "ca.crt").read_bytes())
    monkeypatch.undo()
    make_certificates(files_of(tmp_path), str(folder), {"a"})
    for trusted in (folder / "ca.crt", old):
        attime = ["-attime", int(time.time()) + 86400 * (3 if days[0] > 0 else -3)] if trusted == old else []
        assert openssl("verify", *attime, "-CAfile", trusted, folder / "server.pem").strip().endswith("OK")


def test_the_names_of_this_host():
    found = host_names()
    assert {"localhost", "127.0.0.1", "::1", socket.gethostname()} <= found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("198.51.100.1", 9))
        except OSError:
            return  # no route: nothing more to know
        assert sock.getsockname()[0] in found


def test_without_openssl_the_error_says_what_to_do(tmp_path):
    environment = dict(os.environ, PATH=str(tmp_path))
    done = run_tinyreg("serve", "--root", tmp_path / "r", "--listen", "127.0.0.1:0", "--tls", env=environment)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "openssl" in done.stderr and "--tls-cert" in done.stderr


@pytest.mark.parametrize("options, says", [
    (["--tls-key", "x"], "--tls-cert"), (["--tls", "--tls-cert", "x"], "--tls-cert"),
    (["--tls-client-ca", "x"], "--tls"), (["--tls-cert", "missing"], "missing"),
    (["--tls-cert", __file__], "can't use"), (["--tls-name", "hub.lab"], "--tls-name goes with --tls"),
    (["--users", "missing"], "missing"), (["--rules", __file__], "line 1 is no rule")])
def test_options_that_cannot_work_are_refused_in_one_line(tmp_path, options, says):
    done = run_tinyreg("serve", "--root", tmp_path / "r", "--listen", "127.0.0.1:0", *options)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_what_is_wrong_with_a_certificate_of_one_s_own_is_told_and_nobody_asked_for_a_password(tmp_path):
    for name, password in (("locked", "secret"), ("own", None), ("other", None)):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=x",
                "-keyout", tmp_path / (name + ".key"), "-out", tmp_path / (name + ".crt"),
                *(["-passout", "pass:" + password] if password else ["-nodes"]))
    openssl("x509", "-in", tmp_path / "own.crt", "-outform", "DER", "-out", tmp_path / "own.der")
    for certificate, key, client_ca, told in (
            ("locked.crt", "locked.key", None, "has a password; take it off with: openssl pkey -in"),
            ("own.crt", None, None, "; name its file with --tls-key"),
            ("own.crt", "own.crt", None, "there is no key in"),
            ("own.der", "own.key", None, "there is no certificate in"),
            ("own.crt", "other.key", None, "the key is not that of the certificate"),
            ("own.crt", "own.key", "own.key", "there is no certificate in")):
        options = [word for option, name in (("--tls-cert", certificate), ("--tls-key", key),
                                             ("--tls-client-ca", client_ca)) if name
                   for word in (option, tmp_path / name)]
        done = run_tinyreg("serve", "--root", tmp_path / "r", "--listen", "127.0.0.1:0", *options,
                           stdin=subprocess.DEVNULL, timeout=PATIENCE)
        assert done.returncode == 1 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr


# On the wire

@pytest.mark.parametrize("python", [version for version in sorted(found_pythons()) if version in (
    min(found_pythons()), max(found_pythons()))], ids=str)
def test_the_oldest_and_the_newest_python(store, tmp_path, start_server, python):
    python = found_pythons()[python]
    assert run_tinyreg("passwd", "alice", "--users", tmp_path / "users", "--stdin", input="secret", python=python
                       ).returncode == 0
    content = os.urandom(200000)
    digest = push_blob(store, "app", content)
    server = start_server(None, "--tls", "--users", tmp_path / "users", python=python)
    talk = Talk(server, trusting(server))
    assert talk.ask("GET", "/v2/")[0] == 401
    credentials = "Basic " + base64.b64encode(b"alice:secret").decode()
    assert talk.ask("GET", "/v2/app/blobs/" + digest, Authorization=credentials)[2] == content
    talk.close()
    assert server.stop() == 0 and "Warning" not in server.log()


def test_a_client_that_trusts_the_ca(tls_server):
    assert tls_server.url.startswith("https://")
    talk = Talk(tls_server, trusting(tls_server), "registry.lab")
    assert talk.ask("GET", "/v2/")[0] == 200
    assert talk.ask("GET", "/v2/app/blobs/" + tls_server.digest)[2] == tls_server.large
    status, headers, body = talk.ask("GET", "/v2/app/blobs/" + tls_server.digest, Range="bytes=1048000-3000000")
    assert (status, body) == (206, tls_server.large[1048000:3000001])
    assert talk.ask("HEAD", "/v2/app/manifests/latest")[0] == 200
    assert talk.ask("GET", "/v2/app/manifests/latest")[0] == 200
    talk.close()


def test_an_upload_over_tls(tls_server):
    content = os.urandom(3 << 20)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    talk = Talk(tls_server, trusting(tls_server))
    location = talk.ask("POST", "/v2/app/blobs/uploads/")[1]["location"]
    blocks = (content[start:start + 100000] for start in range(0, len(content), 100000))
    location = talk.ask("PATCH", location, blocks)[1]["location"]  # chunked
    assert talk.ask("PUT", by_digest(location, digest))[0] == 201
    assert talk.ask("GET", "/v2/app/blobs/" + digest)[2] == content
    talk.close()


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    """(address, store, context): a server in this process, with short limits of time."""
    monkeypatch.setattr(tinyreg, "HANDSHAKE_LIMIT", 1.0)
    monkeypatch.setattr(tinyreg, "TICK", 0.1)
    folder = tmp_path / "tls"
    make_certificates(files_of(tmp_path), str(folder), {"localhost"})
    listeners = tinyreg.open_listeners("127.0.0.1", 0)
    store = Directory(str(tmp_path / "r"))
    observation = tinyreg.Observation(store.layout.own, "off", set())
    server = tinyreg.Worker(listeners, store, tinyreg.Access("admin"), observation, drain=5,
                            tls=Certificates(str(folder / "server.pem")))
    server.start()
    yield listeners[0].getsockname(), store, ssl.create_default_context(cafile=str(folder / "ca.crt"))
    server.stop()


def test_a_slow_reader_gets_all(impatient):
    """It stops for longer than a tick, more than once: the same bytes must go out once more, in order."""
    address, store, context = impatient
    content = os.urandom(5 << 20)
    digest = push_blob(store, "app", content)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(address)
    received = b""
    with context.wrap_socket(sock, server_hostname="localhost") as secured:
        secured.sendall(("GET /v2/app/blobs/%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % digest).encode())
        for pause in (0.5, 0.5, 0):
            time.sleep(pause)  # what is tested is that nothing is read in this time
            for block in iter(lambda: secured.recv(1 << 16), b""):
                received += block
                if pause and len(received) > (1 << 20):
                    break
    assert received.partition(b"\r\n\r\n")[2] == content


def test_a_slow_writer_is_waited_for(impatient):
    address, store, context = impatient
    with context.wrap_socket(socket.create_connection(address), server_hostname="localhost") as sock:
        for part in (b"GET /v2/ HT", b"TP/1.1\r\nHost: x\r\n", b"\r\n"):
            sock.sendall(part)
            time.sleep(0.25)  # more than a tick
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize("version, works", [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_no_version_below_1_2(tls_server, version, works):
    if not hasattr(ssl, "TLSVersion"):
        pytest.skip("this Python's ssl can't choose")
    context = trusting(tls_server)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    if works:
        assert Talk(tls_server, context).ask("GET", "/v2/")[0] == 200
    else:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            Talk(tls_server, context)


def test_plain_http_gets_the_ca_and_how_to_use_it_and_nothing_else(tls_server):
    talk = Talk(tls_server)
    with open(os.path.join(tls_server.root, "tinyreg", "tls", "ca.crt"), "rb") as file:
        ca = file.read()
    assert talk.ask("GET", "/ca.crt")[::2] == (200, ca)
    page = talk.ask("GET", "/")[2].decode()
    assert "https://localhost" in page
    fingerprint = openssl("x509", "-noout", "-fingerprint", "-sha256", input=ca.decode()).strip().partition("=")[2]
    assert fingerprint in page and talk.ask("GET", "/use")[2].decode() == page
    for method, target in [("GET", "/v2/"), ("GET", "/v2/app/manifests/latest"), ("POST", "/ca.crt"),
                           ("GET", "/v2/token"), ("GET", "/use/docker.sh")]:  # a shell would run that
        status, headers, body = talk.ask(method, target)
        assert status == 400 and b"use https://localhost, as http://localhost/use says" in body
        assert "www-authenticate" not in headers
    talk.close()
    secure = Talk(tls_server, trusting(tls_server))
    assert secure.ask("GET", "/ca.crt")[::2] == (200, ca)
    secure.close()


def test_a_tls_hello_on_a_plain_port_is_answered_in_http(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        assert sock.recv(100).startswith(b"HTTP/1.0 400 ")


def test_who_connects_and_says_nothing_blocks_nobody(tls_server):
    silent = [socket.create_connection(("127.0.0.1", tls_server.port)) for _ in range(50)]
    half = [socket.create_connection(("127.0.0.1", tls_server.port)) for _ in range(20)]
    for sock in half:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
    context = trusting(tls_server)
    for _ in range(10):
        talk = Talk(tls_server, context)
        assert talk.ask("GET", "/v2/")[0] == 200
        talk.close()
    for sock in silent + half:
        sock.close()


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_has_a_time_limit(impatient, hello):
    with socket.create_connection(impatient[0], timeout=PATIENCE) as sock:
        sock.sendall(hello)
        with pytest.raises(ConnectionResetError):  # the end can come as either
            while sock.recv(100):
                pass
            raise ConnectionResetError


@pytest.mark.parametrize("bytes_sent", [b"\x16" + bytes(300), b"\x16\x03\x01\x00\x05hello",
                                        b"\x16\x03\x03\xff\xff" + b"x" * 70000])
def test_garbage_in_a_handshake_ends_the_connection_only(tls_server, bytes_sent):
    with socket.create_connection(("127.0.0.1", tls_server.port), timeout=PATIENCE) as sock:
        sock.sendall(bytes_sent)
        with pytest.raises(ConnectionResetError):
            while sock.recv(100):
                pass
            raise ConnectionResetError
    assert "Traceback" not in tls_server.log()
    assert Talk(tls_server, trusting(tls_server)).ask("GET", "/v2/")[0] == 200


def test_a_reset_in_the_middle_is_no_fault_of_ours(tls_server):
    context = trusting(tls_server)
    for _ in range(5):
        talk = Talk(tls_server, context)
        talk.connection.sock.sendall(("GET /v2/app/blobs/%s HTTP/1.1\r\nHost: x\r\n\r\n" % tls_server.digest).encode())
        talk.connection.sock.recv(1000)
        talk.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        talk.close()
    assert Talk(tls_server, context).ask("GET", "/v2/")[0] == 200
    assert "Traceback" not in tls_server.log() and "ERROR" not in tls_server.log()


def test_who_does_not_trust_the_ca_leaves_a_line_in_the_log(tls_server):
    with pytest.raises(ssl.SSLError):
        Talk(tls_server, ssl.create_default_context())
    until(lambda: "unknown ca" in tls_server.log().lower().replace("_", " "))
    until(lambda: " TLS - 499 " in tls_server.log())  # /live and --log explain say what that means
    assert "no TLS handshake" in tls_server.log()


def test_stopping_ends_idle_connections_at_once(start_server):
    server = start_server(None, "--tls", "--workers", "1", "--drain", "3600")
    talk = Talk(server, trusting(server))
    assert talk.ask("GET", "/v2/")[0] == 200
    silent = socket.create_connection(("127.0.0.1", server.port))
    assert server.stop() == 0
    silent.close()
    talk.close()


# Certificates that change, and those of clients

def make_pair(folder, name, cn, ca=None):
    """NAME.pem, key and certificate; signed by itself, or by the CA of that name."""
    arguments = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                 "-subj", cn, "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key",
                 "-out", folder / "cert"]
    if ca:
        arguments += ["-CA", folder / (ca + ".pem"), "-CAkey", folder / (ca + ".pem")]
    openssl(*arguments)
    content = (folder / "key").read_text() + (folder / "cert").read_text()
    (folder / "new").write_text(content)
    os.rename(str(folder / "new"), str(folder / (name + ".pem")))
    return str(folder / (name + ".pem"))


def presented(server):
    """The certificate that a server shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    talk = Talk(server, context)
    found = talk.connection.sock.getpeercert(binary_form=True)
    talk.close()
    return found


@pytest.mark.parametrize("hint", ["SIGHUP", "none"])
def test_a_changed_certificate_is_taken_and_no_connection_dropped(tmp_path, start_server, hint):
    certificate = make_pair(tmp_path, "server", "/CN=first")
    server = start_server(None, "--tls-cert", certificate, "--workers", "2")
    first = presented(server)
    context = ssl.create_default_context(cafile=certificate)
    open_since_then = Talk(server, context)
    assert open_since_then.ask("GET", "/v2/")[0] == 200
    sock = open_since_then.connection.sock
    make_pair(tmp_path, "server", "/CN=second")
    if hint == "SIGHUP":
        server.process.send_signal(signal.SIGHUP)
    until(lambda: first not in [presented(server) for _ in range(20)])  # by either process
    assert open_since_then.ask("GET", "/v2/")[0] == 200 and open_since_then.connection.sock is sock
    (tmp_path / "server.pem").write_text("broken")
    until(lambda: presented(server) != first and "stays in use" in server.log())
    open_since_then.close()


def test_client_certificates_name_the_user(tmp_path, start_server):
    make_pair(tmp_path, "ca", "/CN=our CA")
    (tmp_path / "rules").write_text("** * pull\nteam/** carol push\n")
    server = start_server(None, "--tls", "--tls-client-ca", tmp_path / "ca.pem", "--rules", tmp_path / "rules")
    expected = {"/CN=carol": (200, 202), "/CN=dave": (200, 403), "/O=no name": (403, 403),
                "/CN=carol/CN=dave": (403, 403), "/CN=@anonymous": (403, 403)}
    for subject, statuses in expected.items():
        talk = Talk(server, trusting(server, make_pair(tmp_path, "client", subject, "ca")))
        assert (talk.ask("GET", "/v2/_catalog")[0],
                talk.ask("POST", "/v2/team/a/blobs/uploads/")[0]) == statuses
        talk.close()
    for stranger in (None, make_pair(tmp_path, "client", "/CN=carol")):
        with pytest.raises(OSError):  # TLS 1.3 tells the client with the first read
            Talk(server, trusting(server, stranger)).ask("GET", "/v2/")


def test_what_one_certificate_was_answered_is_not_kept_for_another(store, tmp_path, start_server):
    make_pair(tmp_path, "ca", "/CN=our CA")
    (tmp_path / "rules").write_text("secret carol pull\n")
    make_image(store, "secret")
    server = start_server(tmp_path / "registry", "--tls", "--tls-client-ca", tmp_path / "ca.pem", "--workers", "1",
                          "--rules", tmp_path / "rules")
    carol = Talk(server, trusting(server, make_pair(tmp_path, "client", "/CN=carol", "ca")))
    dave = Talk(server, trusting(server, make_pair(tmp_path, "client", "/CN=dave", "ca")))
    for _ in range(5):
        assert carol.ask("GET", "/v2/secret/manifests/latest")[0] == 200
        assert dave.ask("GET", "/v2/secret/manifests/latest")[0] == 403
    carol.close()
    dave.close()


def test_secrets_are_in_no_file_that_others_may_read_and_in_no_log(tmp_path, start_server):
    done = run_tinyreg("passwd", "alice", "--users", tmp_path / "users", "--stdin", input="a very secret word\n")
    assert done.returncode == 0
    server = start_server(None, "--tls", "--users", tmp_path / "users")
    talk = Talk(server, trusting(server))
    for credentials in ("alice:a very secret word", "alice:a very wrong word"):
        encoded = base64.b64encode(credentials.encode()).decode()
        talk.ask("GET", "/v2/", Authorization="Basic " + encoded)
        talk.ask("GET", "/v2/token", Authorization="Basic " + encoded)
        assert encoded not in server.log()
    talk.close()
    server.stop()
    assert "a very" not in server.log() + server.banner
    readable = []
    for top, _, names in os.walk(server.root):
        for name in names:
            path = os.path.join(top, name)
            with open(path, "rb") as file:
                content = file.read()
            if os.stat(path).st_mode & 0o077 and (b"PRIVATE KEY" in content or name.endswith(".key")):
                readable.append(path)
    assert readable == []


def test_archives_are_served_with_users_and_tls_and_the_keys_lie_in_the_store(start_server, tmp_path):
    make_image(Directory(str(tmp_path / "near")), "demo", "1")
    archive, users = str(tmp_path / "images.tar"), str(tmp_path / "users")
    assert run_tinyreg("save", "demo:1", "-o", archive, "--root", tmp_path / "near").returncode == 0
    assert run_tinyreg("passwd", "alice", "--users", users, "--stdin", input="secret\n").returncode == 0
    server = start_server(tmp_path / "far", archive, "--tls", "--users", users)
    context = ssl.create_default_context(cafile=str(tmp_path / "far" / "tinyreg" / "tls" / "ca.crt"))

    def ask(method, path, login):
        password = "Basic " + base64.b64encode(login).decode()
        answer = server.ask(method, path, context=context, authorization=password)
        return answer.status, answer.body

    assert ask("GET", "/v2/demo/tags/list", b"alice:secret") == (200, b'{"name":"demo","tags":["1"]}\n')
    assert ask("GET", "/v2/demo/tags/list", b"alice:wrong")[0] == 401
    status, body = ask("POST", "/v2/demo/blobs/uploads/", b"alice:secret")
    assert status == 403 and b"read-only" in body
    server.stop()
    assert "this registry is read-only" in server.banner
