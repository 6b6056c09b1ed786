"""Access: who asks, what they may do, and what they are told; all by tables, through dispatch and without sockets."""

import base64
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import Client, run_tinyreg
from samples import make_image, make_referrer, push_blob

import tinyreg
from tinyreg import (Access, CommandError, Directory, Request, dispatch, is_checkable, new_hash, parse_glob,
                     parse_rules, parse_users)

# Hashes of "secret". As Apache's htpasswd and openssl passwd make them, at their lowest costs.
HASHES = {
    "bcrypt": "$2y$04$yiBMgCocjy2S5wtZPKX4yeniTeCVPu/0h8rweSqsvlCvBspeU4NkK",
    "sha512": "$6$rounds=1000$tinyregsalt$",
    "sha256": "$5$rounds=1000$tinyregsalt$",
    "md5": "$1$tinyreg1$",
}
SCRYPT = "$scrypt$ln=14,r=8,p=1$c2FsdHNhbHRzYWx0c2FsdHNh$P4fegnNUpi+UAKe9cZ6M7O9ixXLZ5i7tbLUXMHQo+wE"
HAS_CRYPT = tinyreg.load_crypt() is not None
needs_crypt = pytest.mark.skipif(not HAS_CRYPT, reason="this system has no crypt(3)")


def hashed(password, setting="$5$rounds=1000$tinyreg$"):
    """A cheap hash, for the tests' users."""
    return tinyreg.hash_password(password, setting) or new_hash(password)


def basic(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode()).decode()


class World:
    """A store with a few images, and an Access that a test describes."""

    def __init__(self, store, tmp_path):
        self.store = store
        self.tmp_path = tmp_path

    def access(self, rules=None, anonymous=None, users=("alice", "bob")):
        paths = {"users": None, "rules": None}
        if users:
            paths["users"] = str(self.tmp_path / "users")
            with open(paths["users"], "w") as file:
                file.write("".join("%s:%s\n" % (user, hashed("pw-" + user)) for user in users))
        if rules is not None:
            paths["rules"] = str(self.tmp_path / "rules")
            (self.tmp_path / "rules").write_text(rules)
        return Access(anonymous or ("none" if users else "admin"), **paths)

    def ask(self, access, method, target, user=None, password=None, authorization=None, certificate=None,
            client="10.0.0.1", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers.setdefault("host", "registry.test:5000")
        if user:
            headers["authorization"] = basic(user, password or "pw-" + user)
        if authorization:
            headers["authorization"] = authorization
        return dispatch(self.store, access, Request(method, target, headers, None, client, certificate=certificate))

    def status(self, *arguments, **settings):
        return self.ask(*arguments, **settings).status


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """All tests have one, and leave its tags as they are."""
    store = Directory(str(tmp_path_factory.mktemp("access") / "registry"))
    for name in ("docker.io/library/alpine", "pub/a", "team/a", "team/sub/a", "zoo"):
        make_image(store, name)
    return store


@pytest.fixture
def world(store, tmp_path):
    return World(store, tmp_path)


def error_of(response):
    return json.loads(response.body.decode())["errors"][0]


def challenge_of(response):
    return dict(response.headers).get("WWW-Authenticate", "")


# Globs and rules

@pytest.mark.parametrize("glob, matches, misses", [
    ("**", ["a", "a/b", "a/b/c"], []),
    ("*", ["a", "a-b"], ["a/b"]),
    ("team/*", ["team/a", "team/a.b"], ["team", "team/a/b", "xteam/a"]),
    ("team/**", ["team/a", "team/a/b"], ["team", "teams/a"]),
    ("**/alpine", ["x/alpine", "docker.io/library/alpine"], ["alpine", "x/alpine2"]),
    ("docker.io/**", ["docker.io/library/alpine"], ["dockerxio/library/alpine"]),
    ("a*b", ["ab", "axxb"], ["a/b"]),
    ("exact", ["exact"], ["exact/x", "xexact"]),
])
def test_globs(glob, matches, misses):
    assert [name for name in matches + misses if parse_glob(glob).fullmatch(name)] == matches


@pytest.mark.parametrize("line", ["**", "** alice", "** alice write", "** alice pull extra", "Upper alice pull",
                                  "a?b alice pull"])
def test_a_line_that_is_no_rule_is_named(line):
    with pytest.raises(CommandError, match="line 2 .*REPOSITORY-GLOB"):
        parse_rules(("** * pull\n%s\n" % line).encode())


RULES = """
# everybody who has logged in may pull, but for the zoo
** * pull
zoo * none
team/** alice push      # and a comment
team/sub/* alice admin
pub/** @anonymous pull
pub/** bob none
"""


@pytest.mark.parametrize("user, level_of", [
    ("alice", {"pub/a": "pull", "team/a": "push", "team/sub/a": "admin", "zoo": "none", "other": "pull"}),
    ("bob",   {"pub/a": "pull", "team/a": "pull", "team/sub/a": "pull", "zoo": "none"}),  # pub: logged out he could
    (None,    {"pub/a": "pull", "team/a": "none", "team/sub/a": "none", "zoo": "none"}),
])
def test_the_last_rule_that_matches_counts(world, user, level_of):
    access = world.access(RULES)
    for name, level in level_of.items():
        reached = "none"
        for action, target, wanted in [("pull", "/v2/%s/tags/list", "GET"), ("push", "/v2/%s/blobs/uploads/", "POST"),
                                       ("admin", "/v2/%s/manifests/no-such-tag", "DELETE")]:
            if world.status(access, wanted, target % name, user) in (200, 202, 404):
                reached = action
        assert reached == level, name


def test_a_rule_with_user_lets_each_write_under_their_own_name(world):
    access = world.access("** * pull\nstudents/{user}/** * push\nta/{user} alice push\n"
                          "free/{user}/** @anonymous push\n")
    may_push = {(user, name) for user in ("alice", "bob") for name in (
        "students/alice/app", "students/bob/app/x", "students/alicex/app", "students/alice", "ta/alice", "ta/bob")
        if world.status(access, "POST", "/v2/%s/blobs/uploads/" % name, user) == 202}
    assert may_push == {("alice", "students/alice/app"), ("bob", "students/bob/app/x"), ("alice", "ta/alice")}
    for name in ("free/alice/x", "free//x", "free/x"):
        assert world.status(access, "POST", "/v2/%s/blobs/uploads/" % name) in (400, 401)  # who has no name


@pytest.mark.parametrize("user", ["**", "*", "a/b", "a*", "Alice", "{user}", "..", "a.", "-a", "\u00e4", "al ice"])
def test_a_user_whose_name_is_no_part_of_a_repositorys_name_gets_nothing_by_it(user):
    rules = tinyreg.Rules("rules", "none")
    rules.rules = parse_rules(b"students/{user}/** * push\n")
    names = ("students/alice/app", "students/%s/app" % user, "students/a/b/app", "students/ab/app")
    assert [rules.level(user, name) for name in names] == [0] * 4


def test_what_others_do_is_shown_to_nobody_without_a_name_where_there_are_users(start_server, tmp_path):
    (tmp_path / "users").write_text("alice:%s\n" % hashed("pw"))
    alice = basic("alice", "pw")
    anyone = ["--anonymous", "pull", "--log", "explain"]
    targets = ("/metrics", "/disk", "/live", "/live/events", "/", "/use")

    def statuses(server, **headers):
        answers = {}
        for target in targets:
            with server.open("GET", target, connection="close", **headers) as response:
                answers[target] = response.status
        return answers

    server = start_server(None, "--users", tmp_path / "users", *anyone)
    assert statuses(server) == dict(dict.fromkeys(targets, 401), **{"/": 200, "/use": 200})
    token = server.ask("GET", "/v2/token?scope=repository:x:pull").json["token"]
    assert server.ask("GET", "/metrics", authorization="Bearer " + token).status == 401  # nobody's
    assert "Basic" in server.ask("GET", "/live").headers["WWW-Authenticate"]  # so a browser asks
    assert set(statuses(server, authorization=alice).values()) == {200}
    server = start_server(None, "--users", tmp_path / "users", "--metrics-open", *anyone)
    assert [server.ask("GET", target).status for target in ("/metrics", "/disk")] == [200, 401]
    server = start_server(None, *anyone)
    assert set(statuses(server).values()) == {200}


@pytest.mark.parametrize("rules, anonymous, user, expected", [
    (None,                  "none",  "alice", [200, 202, 404]),   # without rules a user may do everything
    (None,                  "none",  None,    [401, 401, 401]),
    (None,                  "pull",  None,    [200, 401, 401]),
    (None,                  "push",  None,    [200, 202, 401]),
    ("",                    "none",  "alice", [403, 403, 403]),   # with rules, what none allows is denied
    ("",                    "pull",  "alice", [200, 403, 403]),
    ("** alice none\n** @anonymous admin", "none", "alice", [200, 202, 404]),   # logging out must not help
    ("team/a @anonymous push", "none", None,  [200, 202, 401]),
])
def test_defaults_and_anonymous(world, rules, anonymous, user, expected):
    access = world.access(rules, anonymous)
    assert [world.status(access, "GET", "/v2/team/a/tags/list", user),
            world.status(access, "POST", "/v2/team/a/blobs/uploads/", user),
            world.status(access, "DELETE", "/v2/team/a/manifests/nope", user)] == expected


@pytest.mark.parametrize("rules, anonymous, line", [
    ("team/** alice push",             "push", "team/** alice push"),  # anybody could
    ("** * pull",                      "push", "** * pull"),
    ("zoo * none",                     "pull", "zoo * none"),
    ("team/** alice pull",             "pull", "team/** alice pull"),
    ("students/{user}/** * push",      "push", "students/{user}/** * push"),
    ("zoo * none",                     "admin", "zoo * none"),
    ("** * pull\nteam/** alice push", "pull", None),  # who has logged in may do more
    ("zoo * none",                     "none", None),
    ("** @anonymous push\nteam/** alice push", "none", None),  # as the file itself says
])
def test_a_rule_that_anonymous_would_make_void_is_refused(world, caplog, rules, anonymous, line):
    if not line:
        world.access(rules, anonymous)
        return
    with pytest.raises(tinyreg.CommandError) as raised:
        world.access(rules, anonymous)
    words = str(raised.value)
    assert "the line " + line + " binds nobody" in words and "--anonymous " + anonymous in words
    advice = re.search("add the line ([^,]+ none)", words).group(1)
    access = world.access(rules + "\n" + advice, anonymous)  # with it the rule binds
    name = line.split()[0].replace("{user}", "bob").replace("**", "a")
    levels = {user: access.rules.level(user, name) for user in (None, "carol")}
    assert levels[None] == 0 and levels["carol"] < 2
    # A file that changes while the server runs is looked at in the same way.
    running = world.access("", anonymous)
    (world.tmp_path / "rules").write_text(rules)
    assert world.status(running, "GET", "/v2/team/a/tags/list") == 200
    assert "stay in force" in caplog.text and "binds nobody" in caplog.text


@pytest.mark.parametrize("anonymous, expected", [("none", [403, 403, 403, 403]), ("pull", [200, 200, 403, 403]),
                                                 ("push", [200, 200, 202, 403]), ("admin", [200, 200, 202, 404])])
def test_without_users_nobody_is_asked_for_a_password(world, anonymous, expected):
    access = world.access(anonymous=anonymous, users=())
    questions = [("GET", "/v2/"), ("GET", "/v2/zoo/tags/list"), ("POST", "/v2/zoo/blobs/uploads/"),
                 ("DELETE", "/v2/zoo/manifests/nope")]
    answers = [world.ask(access, method, target, "anybody", "at all") for method, target in questions]
    assert [answer.status for answer in answers] == expected
    for answer in answers:
        if answer.status == 403:
            assert error_of(answer)["code"] == "DENIED" and "--anonymous" in error_of(answer)["message"]


def by_only_this_machine(world, only_local=True, version="1.1", **headers):
    """What a request to read, one to push and one to delete are told, by a server that only this machine can reach,
    and to which nobody has said who may do what."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    access = Access("admin", only_local=only_local)
    return [dispatch(world.store, access, Request(method, target, headers, client="127.0.0.1", version=version))
            for method, target in (("GET", "/v2/zoo/tags/list"), ("POST", "/v2/zoo/blobs/uploads/"),
                                   ("DELETE", "/v2/zoo/manifests/nope"))]


HERE = {"host": "localhost:5000"}
ALL, READ, NOTHING = [200, 202, 404], [200, 403, 403], [403, 403, 403]


@pytest.mark.parametrize("headers, statuses", [
    (HERE, ALL), ({"host": "127.0.0.1"}, ALL), ({"host": "[::1]:5000"}, ALL), ({"host": "LOCALHOST"}, ALL),
    ({"host": "127.1.2.3:80"}, ALL), (dict(HERE, origin="http://localhost:5000"), ALL),
    # a web page in a browser on this machine
    ({"host": "hub.lab"}, NOTHING), ({"host": "127.0.0.1.evil.example"}, NOTHING),
    ({"host": "localhost.evil"}, NOTHING),
    ({"host": "127.0.0.1:80:80"}, NOTHING), ({"host": "127.0.0.1%evil"}, NOTHING), ({"host": "0.0.0.0"}, NOTHING),
    ({"host": "10.0.0.1"}, NOTHING), ({"host": "::1.evil"}, NOTHING),
    (dict(HERE, origin="http://localhost:8080"), READ), (dict(HERE, origin="null"), READ),
    # a proxy on this machine: nginx says where we are as Host, unless it is told better
    (dict(HERE, x_forwarded_host="hub.lab"), READ), (dict(HERE, x_forwarded_for="10.0.0.1"), READ),
    (dict(HERE, x_forwarded_proto="https"), READ), (dict(HERE, x_real_ip="10.0.0.1"), READ),
    (dict(HERE, via="1.1 proxy"), READ), (dict(HERE, forwarded="for=10.0.0.1"), READ),
    (dict(HERE, version="1.0"), READ), ({"version": "1.0"}, READ)])
def test_where_only_this_machine_connects_proxies_and_web_pages_are_refused(world, headers, statuses):
    """Unless that was said: with --anonymous, or with users."""
    answers = by_only_this_machine(world, **headers)
    assert [answer.status for answer in answers] == statuses
    for answer in answers:
        if answer.status == 403:
            assert "--anonymous push" in error_of(answer)["message"] and "as localhost" in error_of(answer)["message"]
    assert [answer.status for answer in by_only_this_machine(world, only_local=False, **headers)] == ALL


@pytest.mark.parametrize("options, statuses", [([], (403, 403)), (["--anonymous", "push"], (200, 202))])
def test_the_default_is_for_this_machine_only(start_server, options, statuses):
    with Client(start_server(None, *options)) as client:
        for (method, path), status in zip((("GET", "/v2/_catalog"), ("POST", "/v2/a/blobs/uploads/")), statuses):
            assert client.ask(method, path, host="hub.lab").status == status


def test_a_denial_says_which_rule_would_help(world):
    message = error_of(world.ask(world.access(RULES), "POST", "/v2/team/a/blobs/uploads/", "bob"))["message"]
    assert "bob may pull in team/a;" in message and "team/a bob push" in message


def test_a_student_who_pushes_to_the_wrong_name_is_told_the_right_one(world):
    """By the denial, and by the page."""
    access = world.access("** * pull\nstudents/{user}/** * push\n** bob admin\nstudents/alice/secret carol push\n")
    message = error_of(world.ask(access, "POST", "/v2/students/alice/blobs/uploads/", "alice"))["message"]
    assert "alice may pull in students/alice, but may push to students/alice/**;" in message
    for user, name in (("alice", "students/alice/alpine"), (None, "students/your-name/alpine"), ("bob", "alpine")):
        page = world.ask(access, "GET", "/use", user).body.decode()
        assert "docker push registry.test:5000/%s<" % name in page, user
    message = error_of(world.ask(world.access("** * pull\n"), "POST", "/v2/a/blobs/uploads/", "alice"))["message"]
    assert "alice may pull in a;" in message


# 401

@pytest.mark.parametrize("method, target", [
    ("GET", "/v2/"), ("HEAD", "/v2/"), ("GET", "/v2"), ("GET", "/v2/_catalog"), ("GET", "/v2/zoo/tags/list"),
    ("HEAD", "/v2/zoo/manifests/latest"), ("GET", "/v2/no/such/thing"), ("GET", "/v2/Bad/tags/list"), ("PUT", "/v2/x"),
    ("PATCH", "/v2/zoo/tags/list"), ("POST", "/v2/zoo/blobs/uploads/"), ("DELETE", "/v2/zoo/manifests/latest"),
    ("GET", "/")])
def test_every_path_asks_for_a_password(world, method, target):
    for access in (world.access(), world.access("** * pull")):
        answer = world.ask(access, method, target)
        assert answer.status == 401 and challenge_of(answer) == 'Basic realm="tinyreg"'
        assert error_of(answer)["code"] == "UNAUTHORIZED"


def test_where_some_need_no_password_docker_is_asked_for_a_token(world):
    """docker gives up on Basic when it is logged out, and never logs in where /v2/ doesn't ask it to."""
    access = world.access("pub/** @anonymous pull\n** * pull")
    answer = world.ask(access, "GET", "/v2/")
    assert answer.status == 401
    assert challenge_of(answer) == 'Bearer realm="http://registry.test:5000/v2/token",service="tinyreg"'
    assert world.status(access, "GET", "/v2/pub/a/tags/list") == 200
    answer = world.ask(access, "GET", "/v2/zoo/tags/list", x_forwarded_proto="https")
    assert challenge_of(answer) == ('Bearer realm="https://registry.test:5000/v2/token",service="tinyreg",'
                                    'scope="repository:zoo:pull"')
    assert "Bearer" not in challenge_of(world.ask(access, "GET", "/v2/", host='x",evil="'))


def test_where_some_need_no_password_who_writes_without_is_asked_for_one(world):
    """BuildKit has docker's command line fetch a token, which does not trust our CA; a password it sends itself."""
    access = world.access(anonymous="pull")
    for method, target in [("POST", "/v2/zoo/blobs/uploads/"), ("PUT", "/v2/zoo/manifests/latest"),
                           ("DELETE", "/v2/zoo/manifests/latest")]:
        answer = world.ask(access, method, target)
        assert answer.status == 401 and challenge_of(answer).startswith('Basic realm="')
        assert world.status(access, method, target, "alice") != 401
        token = token_for(world, access, "repository:zoo:pull")
        for user_s_token in (token, "Bearer expired.token"):
            answer = world.ask(access, method, target, authorization=user_s_token)
            assert answer.status == 401 and challenge_of(answer).startswith('Bearer realm="')


@pytest.mark.parametrize("authorization", [
    "Basic", "Basic ", "Basic !!!", "Basic " + base64.b64encode(b"alice").decode(),
    "Basic " + base64.b64encode(b"\xff\xfe:x").decode(), basic("alice", "pw-bob"), basic("alice", ""), basic("", ""),
    basic("alice", "pw-alice\0"), basic("alice", "x" * 2000), basic("nobody", "pw-alice"), basic("ALICE", "pw-alice"),
    "Bearer", "Bearer x", "Bearer .", "Bearer e30.e30", "Bearer \xe4.\xe4", "Bearer W10=.W10=",
    "Bearer " + base64.urlsafe_b64encode(b"[" * 40000).decode() + ".x"])
def test_wrong_credentials_are_refused_even_where_none_are_needed(world, authorization):
    access = world.access(anonymous="pull")
    assert world.status(access, "GET", "/v2/zoo/tags/list", authorization=authorization) == 401
    assert world.status(access, "GET", "/v2/token", authorization=authorization) == 401


def test_the_scheme_of_credentials_is_case_insensitive(world):
    credentials = basic("alice", "pw-alice").replace("Basic", "bAsIC")
    assert world.status(world.access(), "GET", "/v2/", authorization=credentials) == 200


# Tokens

def token_for(world, access, scope, user=None):
    answer = world.ask(access, "GET", "/v2/token?service=tinyreg&account=x&scope=" + scope, user)
    assert answer.status == 200, answer.body
    found = json.loads(answer.body.decode())
    assert found["token"] == found["access_token"] and found["expires_in"] >= 60
    return "Bearer " + found["token"]


@pytest.mark.parametrize("user, scope, expected", [
    ("alice", "repository:team/a:pull,push", {"GET": 200, "POST": 202, "DELETE": 403}),
    ("alice", "repository:team/a:pull",      {"GET": 200, "POST": 401, "DELETE": 403}),
    ("alice", "repository:other:pull,push",  {"GET": 401, "POST": 401, "DELETE": 403}),
    ("alice", "",                            {"GET": 401, "POST": 401, "DELETE": 403}),
    ("alice", "repository:team/a:*",         {"GET": 200, "POST": 202, "DELETE": 403}),
    ("bob",   "repository:team/a:pull,push", {"GET": 200, "POST": 403, "DELETE": 403}),
    (None,    "repository:team/a:pull,push", {"GET": 401, "POST": 401, "DELETE": 401}),
])
def test_tokens_are_good_for_what_was_asked_and_the_rules_allow(world, user, scope, expected):
    access = world.access(RULES)
    token = token_for(world, access, scope, user)
    assert world.status(access, "GET", "/v2/", authorization=token) == 200
    targets = {"GET": "tags/list", "POST": "blobs/uploads/", "DELETE": "manifests/nope"}
    for method, status in expected.items():
        answer = world.ask(access, method, "/v2/team/a/" + targets[method], authorization=token)
        assert answer.status == status, method
        if status == 401:
            assert 'error="insufficient_scope"' in challenge_of(answer) and "scope=" in challenge_of(answer)


def test_a_token_for_a_short_name_is_good_where_a_mirror_finds_it(world):
    access = world.access("** * pull\npub/** @anonymous pull")
    token = token_for(world, access, "repository:library/alpine:pull", "alice")
    for name, status in [("docker.io/library/alpine", 200), ("alpine", 401), ("zoo", 401)]:
        assert world.status(access, "GET", "/v2/%s/tags/list" % name, authorization=token) == status


def test_a_token_for_a_short_name_writes_nowhere_else(world):
    access = world.access("** * admin\npub/** @anonymous pull")
    token = token_for(world, access, "repository:library/alpine:*", "alice")
    for name, statuses in [("docker.io/library/alpine", [200, 401, 401]), ("library/alpine", [200, 202, 404])]:
        assert [world.status(access, method, "/v2/%s/%s" % (name, target), authorization=token)
                for method, target in (("GET", "tags/list"), ("POST", "blobs/uploads/"),
                                       ("DELETE", "manifests/none"))] == statuses, name


def test_the_challenge_of_a_mount_names_both_repositories(world):
    target = "/v2/team/a/blobs/uploads/?mount=sha256:%s&from=" % ("0" * 64)
    for source, scope in [("zoo", "repository:team/a:pull,push repository:zoo:pull"),
                          ('x"', "repository:team/a:pull,push")]:
        answer = world.ask(world.access(RULES), "POST", target + source)
        assert challenge_of(answer).endswith(',scope="%s"' % scope)


def test_tokens_end(world, monkeypatch):
    access = world.access(RULES)
    token = token_for(world, access, "repository:team/a:pull", "alice")
    assert world.status(access, "GET", "/v2/team/a/tags/list", authorization=token) == 200
    now = time.time()
    monkeypatch.setattr(tinyreg.time, "time", lambda: now + tinyreg.TOKEN_LIFE + 2)
    answer = world.ask(access, "GET", "/v2/team/a/tags/list", authorization=token)
    assert answer.status == 401 and 'error="invalid_token"' in challenge_of(answer)
    # One that was given away while the clock was years ahead would be good for years.
    monkeypatch.setattr(tinyreg.time, "time", lambda: now - 1e8)
    assert world.status(access, "GET", "/v2/team/a/tags/list", authorization=token) == 401


def test_a_new_password_ends_the_tokens(world):
    access = world.access(RULES)
    token = token_for(world, access, "repository:team/a:pull", "alice")
    (world.tmp_path / "users").write_text("alice:%s\n" % hashed("another"))
    access.watch.next_look = 0.0
    assert world.status(access, "GET", "/v2/", authorization=token) == 401
    assert world.status(access, "GET", "/v2/", "alice") == 401
    assert world.status(access, "GET", "/v2/", "alice", "another") == 200


def test_a_token_is_refused_where_another_key_is_used_and_buys_no_other(world):
    access = world.access(RULES)
    token = token_for(world, access, "repository:team/a:pull", "alice")
    assert world.status(access, "GET", "/v2/token?scope=repository:team/a:push", authorization=token) == 401
    assert world.status(world.access(RULES), "GET", "/v2/", authorization=token) == 401
    for place in range(7, len(token) - 1, 5):  # the last letter's low bits mean nothing in base64
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1:]
        assert world.status(access, "GET", "/v2/", authorization=changed) == 401, place


# Catalog, mount, certificates

@pytest.mark.parametrize("user, expected", [
    ("alice", ["docker.io/library/alpine", "pub/a", "team/a", "team/sub/a"]), (None, ["pub/a"])])
def test_the_catalog_lists_what_the_client_may_pull_page_by_page(world, user, expected):
    access = world.access(RULES)
    found, target = [], "/v2/_catalog?n=1"
    while target:
        answer = world.ask(access, "GET", target, user)
        found += json.loads(answer.body.decode())["repositories"]
        assert len(found) < 10
        target = dict(answer.headers).get("Link", "").partition("<")[2].partition(">")[0]
    assert found == expected


@pytest.mark.parametrize("rules, source, user, expected", [
    ("team/** bob push\nzoo * none",            "zoo",    "bob", 202),
    ("team/** bob push\nzoo * pull",            "zoo",    "bob", 201),
    ("team/** bob push",                        "zoo",    "bob", 202),
    ("** * pull\nteam/** bob push\nzoo * none", None,     "bob", 202),   # it might be the zoo's
    ("** * pull\nteam/** bob push",             None,     "bob", 202),   # the rules may close another
    (None,                                      None,     "bob", 201),
    (None,                                      "zoo",    "bob", 201),
])
def test_a_mount_takes_no_blob_that_the_client_may_not_pull(world, rules, source, user, expected):
    digest = push_blob(world.store, "zoo", os.urandom(20))
    target = "/v2/team/a/blobs/uploads/?mount=" + digest + ("&from=" + source if source else "")
    access = world.access(rules)
    assert world.status(access, "POST", target, user) == expected
    assert world.status(access, "HEAD", "/v2/team/a/blobs/" + digest, user) == {201: 200, 202: 404}[expected]


def test_a_token_for_one_repository_mounts_from_no_other(world):
    digest = push_blob(world.store, "zoo", os.urandom(20))
    access = world.access("** alice push\npub/** @anonymous pull")
    for scope, source, status in [("repository:team/a:pull,push", "&from=zoo", 202),
                                  ("repository:team/a:pull,push", "", 202),
                                  ("repository:team/a:push&scope=repository:zoo:pull", "&from=zoo", 201)]:
        token = token_for(world, access, scope, "alice")
        assert world.status(access, "POST", "/v2/team/a/blobs/uploads/?mount=%s%s" % (digest, source),
                            authorization=token) == status


def test_the_user_of_a_client_certificate(world):
    access = world.access("team/** carol push", users=(), anonymous="none")
    assert world.status(access, "POST", "/v2/team/a/blobs/uploads/", certificate="carol") == 202
    assert world.status(access, "POST", "/v2/team/a/blobs/uploads/", certificate="dave") == 403
    assert world.status(access, "GET", "/v2/", certificate="dave") == 200
    assert world.status(access, "GET", "/v2/") == 403


# Passwords

@needs_crypt
@pytest.mark.parametrize("name", sorted(HASHES) + ["new"])
def test_hashes_that_the_system_knows(world, name):
    setting = HASHES.get(name) or new_hash("secret")
    stored = setting if len(setting) == 60 else tinyreg.hash_password("secret", setting)
    if not stored or stored.startswith("*"):
        pytest.skip("this system's crypt(3) doesn't know it")
    (world.tmp_path / "users").write_text("alice:%s\n" % stored)
    access = Access("none", str(world.tmp_path / "users"))
    statuses = [world.status(access, "GET", "/v2/", "alice", password) for password in ("secret", "Secret", "secret ")]
    assert statuses == [200, 401, 401]


@pytest.mark.skipif(not hasattr(__import__("hashlib"), "scrypt"), reason="this Python has no scrypt")
def test_scrypt_where_the_system_has_no_bcrypt(world, monkeypatch):
    monkeypatch.setattr(tinyreg, "load_crypt", lambda: None)
    users = "old:%s\nalice:%s\nfriend:%s\n" % (HASHES["bcrypt"], new_hash("secret"), SCRYPT)
    (world.tmp_path / "users").write_text(users)
    access = Access("none", str(world.tmp_path / "users"))
    assert world.status(access, "GET", "/v2/", "alice", "secret") == 200
    assert world.status(access, "GET", "/v2/", "alice", "wrong") == 401
    assert world.status(access, "GET", "/v2/", "friend", "secret") == 200
    assert world.status(access, "GET", "/v2/", "old", "secret") == 401


@needs_crypt
def test_hashes_that_cannot_be_checked_are_reported_by_name(caplog):
    lines = ["# a comment", "", "good:" + HASHES["bcrypt"], "apache:$apr1$0vQS5NPC$yvqdqGTXvBAqVXQxmxCLq0",
             "sha:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "plain:secret", "cut:" + HASHES["bcrypt"][:50], "empty:",
             "nonsense", "@anonymous:" + HASHES["bcrypt"], "*:" + HASHES["bcrypt"]]
    assert list(parse_users("\r\n".join(lines).encode())) == ["good"]
    reported = [record.getMessage().split("'")[1] for record in caplog.records]
    assert reported == ["apache", "sha", "plain", "cut", "empty", "@anonymous", "*"]
    assert HASHES["bcrypt"][10:] not in caplog.text and "5en6G6" not in caplog.text


@needs_crypt
def test_a_broken_hash_locks_out_nobody_else():
    broken = HASHES["bcrypt"][:30] + "!" * 30
    assert list(parse_users(("alice:%s\nbob:%s\n" % (broken, HASHES["bcrypt"])).encode())) == ["bob"]


@needs_crypt
def test_a_wrong_password_takes_as_long_as_a_user_who_is_not_there(world, monkeypatch):
    """Both cost one hash of the same kind: counted, for time on a busy machine proves nothing."""
    access, hashes = world.access(), []
    monkeypatch.setattr(tinyreg, "hash_password", lambda password, setting: hashes.append(setting) or "")
    for user in ("alice", "nobody", "", "@anonymous"):
        world.ask(access, "GET", "/v2/", authorization=basic(user, "wrong"))
    assert len(hashes) == 4 and len({setting[:24] for setting in hashes}) == 1


def test_a_good_password_is_hashed_once(world, monkeypatch):
    access = world.access()
    assert world.status(access, "GET", "/v2/", "alice") == 200
    monkeypatch.setattr(tinyreg, "hash_password", lambda *anything: pytest.fail("hashed again"))
    assert world.status(access, "GET", "/v2/", "alice") == 200
    assert "pw-alice" not in repr(vars(access.passwords))


def test_many_wrong_passwords_from_one_address_are_slowed_down(world, monkeypatch):
    access = world.access()
    assert world.status(access, "GET", "/v2/", "bob") == 200
    statuses = [world.status(access, "GET", "/v2/", "alice", "guess %d" % number) for number in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    answer = world.ask(access, "GET", "/v2/", "alice")  # right, but who knows whether it was guessed
    assert answer.status == 429 and 0 < int(dict(answer.headers)["Retry-After"]) <= 61
    assert error_of(answer)["code"] == "TOOMANYREQUESTS"
    assert world.status(access, "GET", "/v2/", "bob") == 200                      # logged in before: not locked out
    assert world.status(access, "GET", "/v2/", "alice", client="10.0.0.2") == 200  # nor is any other address
    now = time.monotonic()
    monkeypatch.setattr(tinyreg.time, "monotonic", lambda: now + 62)
    assert world.status(access, "GET", "/v2/", "alice") == 200


def test_behind_a_proxy_on_this_machine_only_the_user_is_slowed_down_whose_password_is_guessed(world):
    access = world.access()
    statuses = [world.status(access, "GET", "/v2/", "alice", "guess", client="127.0.0.1") for _ in range(11)]
    assert statuses == [401] * 10 + [429]
    assert world.status(access, "GET", "/v2/", "bob", client="127.0.0.1") == 200


def test_uploads_that_have_ended_are_forgotten(world):
    access = world.access()
    for _ in range(120):
        location = dict(world.ask(access, "POST", "/v2/team/a/blobs/uploads/", "alice").headers)["Location"]
        assert world.status(access, "DELETE", location, "alice") == 204
    assert len(access.uploads.sessions["10.0.0.1"]) < 100


@pytest.mark.parametrize("one, other, same", [
    ("10.0.0.1", "10.0.0.1", True), ("10.0.0.1", "10.0.0.2", False), ("2001:db8::1", "2001:db8:0:0:ffff::", True),
    ("2001:db8:1:2::", "2001:db8:1:3::", False), ("fe80::1%eth0", "fe80::2", True), ("::ffff:10.0.0.1", "::1", False)])
def test_an_ipv6_network_of_64_bits_is_one_client(one, other, same):
    assert (tinyreg.client_key(one) == tinyreg.client_key(other)) == same


@pytest.mark.parametrize("peer, forwarded, client", [
    ("127.0.0.1", "10.0.0.9", "10.0.0.9"), ("::1", "2001:db8::9", "2001:db8::9"),
    ("127.0.0.1", "6.6.6.6, 10.0.0.9", "10.0.0.9"),              # what the client itself has said does not count
    ("127.0.0.1", "10.0.0.9, 192.168.1.7", "10.0.0.9"),          # two proxies, one behind the other
    ("192.168.1.7", "10.0.0.9", "10.0.0.9"), ("192.168.1.8", "10.0.0.9", "192.168.1.8"),
    ("127.0.0.1", "10.0.0.9:4711", "10.0.0.9"), ("127.0.0.1", "[2001:db8::9]:4711", "2001:db8::9"),
    ("127.0.0.1", "::ffff:10.0.0.9", "10.0.0.9"),
    ("127.0.0.1", "10.0.0.9, unknown", "127.0.0.1"), ("127.0.0.1", "", "127.0.0.1"), ("127.0.0.1", ",,", "127.0.0.1")])
def test_proxies_that_are_believed_say_who_the_client_is(peer, forwarded, client):
    assert tinyreg.client_behind(peer, forwarded, [tinyreg.parse_network("192.168.1.7")]) == client


def test_who_shares_another_s_place_is_not_locked_out_by_it(world, monkeypatch):
    """The memory for those who guess is bounded: whoever comes to a place that is taken takes it over."""
    monkeypatch.setattr(tinyreg, "REMEMBERED", 1)
    access = world.access()
    for number in range(12):
        world.ask(access, "GET", "/v2/", "alice", "guess %d" % number, client="10.0.0.1")
    assert world.status(access, "GET", "/v2/", "alice", "guess", client="10.0.0.1") == 429
    assert world.status(access, "GET", "/v2/", "alice", "guess", client="10.0.0.2") == 401
    assert world.status(access, "GET", "/v2/", "alice", client="10.0.0.2") == 200


def test_ten_wrong_passwords_are_ten_for_all_workers_together(start_server, tmp_path):
    (tmp_path / "users").write_text("alice:%s\n" % hashed("secret"))
    server = start_server(None, "--users", tmp_path / "users", "--workers", "4")
    statuses = [server.ask("GET", "/v2/", authorization=basic("alice", "guess %d" % number)).status
                for number in range(30)]
    assert statuses == [401] * 10 + [429] * 20
    assert server.ask("GET", "/v2/", authorization=basic("alice", "secret")).status == 429


def test_who_sends_an_empty_user_and_password_is_not_told_that_they_are_wrong(world):
    """podman and skopeo do, where they are not logged in; it counts as no attempt."""
    access = world.access()
    for credentials in ["Basic", basic("", "")] * 6:
        answer = world.ask(access, "GET", "/v2/", authorization=credentials)
        assert answer.status == 401 and error_of(answer)["message"] == "authentication required"
    assert error_of(world.ask(access, "GET", "/v2/", "alice", "guess"))["message"] == "wrong user name or password"


def test_other_names_that_a_read_may_mean_are_checked_each_and_hide_no_404(world):
    """docker.io/library/alpine answers for alpine only to those who may pull it; and a repository that is not there yet
    is no 403, which would end a push."""
    access = world.access("team/** alice push\nalpine * pull\nlibrary/alpine * pull\ndocker.io/** bob pull")
    targets = ["/v2/alpine/manifests/latest", "/v2/library/alpine/manifests/latest?ns=docker.io",
               "/v2/docker.io/library/alpine/manifests/latest"]
    assert [world.status(access, "GET", target, "bob") for target in targets] == [200, 200, 200]
    assert [world.status(access, "GET", target, "alice") in (403, 404) for target in targets] == [True] * 3
    assert world.status(access, "HEAD", "/v2/team/new/blobs/sha256:" + "0" * 64, "alice") == 404
    assert world.status(access, "HEAD", "/v2/zoo/manifests/latest", "alice") == 403


def test_referrers_of_a_subject_that_is_not_here_are_not_looked_for_under_another_name(world):
    subject = tinyreg.Manifest(b'{"config": {}}', tinyreg.Digest.of(b'{"config": {}}'))
    make_referrer(world.store, "zoo", subject)
    answer = world.ask(world.access(), "GET", "/v2/zoo/referrers/" + subject.digest, "alice")
    assert len(json.loads(answer.body.decode())["manifests"]) == 1


# Files that change

def test_changed_users_and_rules_count_and_broken_ones_do_not(world, caplog):
    access = world.access("** * pull")

    def change(name, text):
        (world.tmp_path / name).write_text(text)
        access.watch.next_look = 0.0

    assert world.status(access, "POST", "/v2/zoo/blobs/uploads/", "alice") == 403
    change("rules", "** * push\n")
    assert world.status(access, "POST", "/v2/zoo/blobs/uploads/", "alice") == 202
    users = (world.tmp_path / "users").read_text()
    (world.tmp_path / "users").write_text("carol:%s\n" % hashed("pw-carol"))
    change("rules", "** * everything\n")
    assert world.status(access, "GET", "/v2/", "bob") == 200  # nor is half of it in force
    (world.tmp_path / "users").write_text(users)
    assert world.status(access, "POST", "/v2/zoo/blobs/uploads/", "alice") == 202
    assert "line 1" in caplog.text and "stay in force" in caplog.text
    os.unlink(str(world.tmp_path / "users"))
    access.watch.next_look = 0.0
    assert world.status(access, "GET", "/v2/", "alice") == 200
    (world.tmp_path / "rules").write_text("** * push\n")
    change("users", "carol:%s\n" % hashed("pw-carol"))
    assert [world.status(access, "GET", "/v2/", user) for user in ("alice", "carol")] == [401, 200]


# passwd

def passwd(path, user, *options, **settings):
    return run_tinyreg("passwd", user, "--users", str(path), *options, **settings)


@needs_crypt
def test_passwd_changes_one_line_and_keeps_the_others_to_the_byte(tmp_path):
    path = tmp_path / "users"
    path.write_bytes(b"# kept \r\nbob:x\xff:y\n\nalice2:z\nalice:old\nalice:older\nlast:z")
    os.chmod(str(path), 0o644)
    done = passwd(path, "alice", "--stdin", input="secret\n")
    assert (done.returncode, done.stderr) == (0, "")
    before, after = path.read_bytes().split(b"alice:")
    assert before == b"# kept \r\nbob:x\xff:y\n\nalice2:z\nlast:z\n" and after.startswith(b"$2")
    assert os.stat(str(path)).st_mode & 0o777 == 0o640  # the group may be that of the server
    assert passwd(path, "new", "--stdin", input="p\xe4ss w:rd \r\n").returncode == 0
    assert path.read_bytes().endswith(b"\n")
    users = parse_users(path.read_bytes())
    assert tinyreg.hash_password("p\xe4ss w:rd ", users["new"]) == users["new"]
    assert tinyreg.hash_password("secret", users["alice"]) == users["alice"]
    assert passwd(path, "alice", "--delete").returncode == 0
    assert b"alice:" not in path.read_bytes() and os.listdir(str(tmp_path)) == ["users"]


@needs_crypt
def test_passwd_lists_who_can_log_in(tmp_path):
    path = tmp_path / "users"
    path.write_text("# people\nbob:%s\nalice:%s\nold:unknown-hash\n" % ((hashed("x"),) * 2))
    done = run_tinyreg("passwd", "--list", "--users", str(path))
    assert (done.returncode, done.stdout) == (0, "alice\nbob\n") and "user 'old' can't log in" in done.stderr
    done = run_tinyreg("passwd", "--list", "--users", str(tmp_path / "none"))
    assert done.returncode == 1 and "there is no" in done.stderr and not (tmp_path / "none").exists()


@pytest.mark.parametrize("user, options, given, says", [
    ("a:b", ["--stdin"], "x\n", "no user name"), ("", ["--stdin"], "x\n", "no user name"),
    ("@anonymous", ["--stdin"], "x\n", "no user name"), ("*", ["--stdin"], "x\n", "no user name"),
    ("alice", ["--stdin"], "\n", "1 to 72 bytes"), ("alice", ["--stdin"], "", "1 to 72 bytes"),
    ("alice", ["--stdin"], "x" * 73, "1 to 72 bytes"), ("alice", ["--stdin"], "a\0b\n", "1 to 72 bytes"),
    ("alice", ["--delete"], "", "no user alice")])
def test_passwd_refuses_in_one_line(tmp_path, user, options, given, says):
    done = passwd(tmp_path / "users", user, *options, input=given)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "users").exists()


@pytest.mark.parametrize("user, given", [(b"alice", b"p\xff\n"), (b"\xff", b"secret\n")])
def test_passwd_takes_only_utf_8(tmp_path, user, given):
    done = subprocess.run([sys.executable, tinyreg.__file__, "passwd", user, "--users", str(tmp_path / "users"),
                           "--stdin"], input=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert not (tmp_path / "users").exists()


def test_passwd_takes_a_class_at_once(tmp_path):
    """Nobody, if a line is wrong; a spreadsheet writes commas."""
    path, command = str(tmp_path / "users"), ["passwd", "--users", str(tmp_path / "users"), "--stdin"]
    done = run_tinyreg(*command, input="anna pw-anna\r\n\n ben  two words \n")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("set the password of ") == 2
    access = Access("none", path)
    for user, password in (("anna", "pw-anna"), ("ben", "two words")):
        assert access.passwords.check("10.0.0.1", basic(user, password)[6:]) == user
    for line in ("carl,secret", "carl", "a:b secret", "carl " + "x" * 73, "carl a\0b"):
        done = run_tinyreg(*command, input="anna other\n%s\n" % line)
        assert done.returncode == 1 and "line 2 of the standard input is not USER PASSWORD" in done.stderr
        assert done.stderr.count("\n") == 1 and Access("none", path).passwords.users == access.passwords.users


@needs_crypt
def test_passwd_without_a_terminal_reads_a_line_and_warns_of_nothing(tmp_path):
    path = tmp_path / "users"
    done = passwd(path, "alice", input="secret\n", start_new_session=True)
    assert (done.returncode, done.stderr) == (0, "")
    users = parse_users(path.read_bytes())
    assert tinyreg.hash_password("secret", users["alice"]) == users["alice"]
    done = passwd(path, "alice", input="", start_new_session=True)
    assert done.returncode == 1 and "1 to 72 bytes" in done.stderr and done.stderr.count("\n") == 1


def test_passwd_where_nothing_can_hash(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tinyreg, "load_crypt", lambda: None)
    monkeypatch.delattr("hashlib.scrypt", raising=False)
    monkeypatch.setattr(tinyreg, "read_password", lambda *anything: "secret")
    assert tinyreg.main(["passwd", "alice", "--users", str(tmp_path / "users")]) == 1
    shown = capsys.readouterr().err
    assert "bcrypt or scrypt" in shown and shown.count("\n") == 1


def test_passwd_asks_twice_on_the_terminal(tmp_path):
    """In a session of its own on a pseudo-terminal, as a person's shell has it."""
    import pty
    for answers, status in [(["secret", "secret"], 0), (["secret", "other"], 1)]:
        process, terminal = pty.fork()
        if not process:
            os.execv(sys.executable, [sys.executable, tinyreg.__file__, "passwd", "alice", "--users",
                                      str(tmp_path / "users")])
        shown = b""
        for prompt, answer in zip((b"password of alice:", b"once more:"), answers):
            while prompt not in shown:
                shown += os.read(terminal, 1000)
            os.write(terminal, answer.encode() + b"\n")
        assert os.waitpid(process, 0)[1] >> 8 == status
        os.close(terminal)
        assert b"secret" not in shown


@needs_crypt
def test_a_crash_of_passwd_leaves_the_old_file(tmp_path):
    """Killed by a file size limit in the middle of its write."""
    path = tmp_path / "users"
    path.write_bytes(b"".join(b"user%d:%s\n" % (number, b"x" * 60) for number in range(100)))
    before = path.read_bytes()
    done = subprocess.run(["sh", "-c", 'ulimit -f 1; echo secret | "$0" "$1" passwd alice --users "$2" --stdin',
                           sys.executable, tinyreg.__file__, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode != 0 and path.read_bytes() == before


@needs_crypt
def test_apache_reads_what_passwd_writes_and_the_other_way_round(tmp_path):
    import shutil
    if not shutil.which("htpasswd"):
        pytest.skip("not installed: htpasswd")
    path = str(tmp_path / "users")
    assert passwd(path, "alice", "--stdin", input="secret\n").returncode == 0
    if parse_users(open(path, "rb").read())["alice"].startswith("$2"):
        assert subprocess.run(["htpasswd", "-vb", path, "alice", "secret"], stderr=subprocess.PIPE).returncode == 0
    subprocess.run(["htpasswd", "-bB", path, "bob", "geheim"], check=True, stderr=subprocess.PIPE)
    stored = parse_users(open(path, "rb").read())["bob"]
    assert is_checkable(stored) and tinyreg.hash_password("geheim", stored) == stored
