#!/usr/bin/env python3
"""tinyreg: a container registry in one file, for machines that no network reaches.

It needs Python 3.6 or newer and nothing else. It is tested on Linux, and written for macOS and the
BSDs, too, where nobody has tested it:

    python3 tinyreg.py                          serve ./registry on http://127.0.0.1:5000
    python3 tinyreg.py serve --listen :5000     serve it to the network: anyone may pull
    python3 tinyreg.py serve --listen :5000 --tls --users FILE    with HTTPS and passwords
    python3 tinyreg.py serve FILE...            serve archives where they lie, read-only
    python3 tinyreg.py passwd NAME --users FILE     set the password of a user
    python3 tinyreg.py clients docker           print what makes docker trust the registry, or
                                                containerd, podman, k3s
    python3 tinyreg.py pull IMAGE               copy an image from its registry into the store
    python3 tinyreg.py push IMAGE --to HOST     copy it to another registry
    python3 tinyreg.py login HOST               keep the password for one
    python3 tinyreg.py save IMAGE -o FILE       write images into an archive
    python3 tinyreg.py load FILE                put the images of an archive into the store
    python3 tinyreg.py add FILE --to NAME:TAG   store files or a Helm chart beside the images
    python3 tinyreg.py get NAME:TAG             write them out as files
    python3 tinyreg.py ls                       list what is in the store
    python3 tinyreg.py tag IMAGE NAME:TAG       give an image one more tag
    python3 tinyreg.py rm NAME:TAG              delete a tag
    python3 tinyreg.py gc                       delete what nothing refers to
    python3 tinyreg.py verify                   read everything again, and name what is damaged
    python3 tinyreg.py help                     print what is needed at night, or for a lesson

The storage directory, ROOT, has the layout of CNCF Distribution: registry:2 and registry:3 can open
it. Beside that tree there is one folder of our own. Without it every image is still there, but gc
no longer knows which ones are pinned.

    ROOT/docker/registry/v2/
        blobs/sha256/ab/abcd…/data          the bytes of each blob and manifest
        repositories/NAME/
            _layers/sha256/abcd…/link       says that the repository has this blob
            _manifests/
                revisions/sha256/abcd…/link     says that it has this manifest
                tags/TAG/current/link           the digest that the tag stands for
                tags/TAG/index/sha256/abcd…/link    each digest that it has stood for
    ROOT/tinyreg/
        shared                  several hosts have this directory open; see serve --shared
        scratch/                files while they are written, folders while they are deleted, and
                                locks of blobs that are being fetched
        uploads/NAME/_UUID, _download-UUID  the bytes that have come so far of an upload, and of a
                                blob that is fetched from another registry
        journal/                small files that are durable here before they are in place, of which
                                a power cut may take them; read when the store is opened
        lock, lock.turnstile    pushes share this lock; deletions hold it alone
        lock.changes            eight bytes that differ after each change, for the caches of
                                processes; not of a shared store: hosts don't share memory
        pinned/NAME/_digests/sha256/abcd…   a manifest that was pulled or loaded by its digest;
                                gc keeps it, although it has no tag
        referrers/NAME/_index   which manifests refer to which; rebuilt if it is missing
        damaged/                what was found damaged, under the path that it had
        ranges/abcd…            parts of blobs, from a split archive whose other parts are to come
        tls/                    ca.crt, ca.key, server.pem: the CA and the certificate that
                                serve --tls has made
        token.key               the key of the tokens of clients that have logged in
        notify/KEY/NUMBER       a notification that waits for the endpoint KEY; KEY.last has the
                                last number as its mtime; KEY.lock and KEY.sender are locks
        live.HOST               the exchanges that /live on this host shows
        usage                   the size of everything, as last measured
        gc, verify              the result of the last run; gc is locked during a run

How a request runs:

    socket -> Connection -> Request  -> dispatch: find the Route, ask Access -> handler -> Registry
    socket <- Connection <- Response <- dispatch: errors become Responses here <-----'

The rooms of this file. Each uses the rooms above it and none below:

     1 Constants     media types, limits, the grammar of names
     2 Errors        what a client can be told, and with which status
     3 Values        digests, names, addresses, manifests
     4 Files         durable writes, locks, the change mark
     5 Registry      the interface of all registries, and rules that wrap one
     6 Signatures    cosign signatures, checked with a key
     7 Directory     the registry in ROOT
     8 Upkeep        gc, expiry of tags, verify
     9 Archive       registries in tar files
    10 Remote        registries over HTTP, and the store that fetches from them
    11 Choice        which images are meant: lists, patterns, pins, new names
    12 Copy          from any registry to any other
    13 Artifacts     files and charts
    14 Access        users, tokens, rules
    15 Observation   log, metrics, /live, notifications
    16 API           the endpoints, and the way to them
    17 Page          the pages for people
    18 Server        sockets, TLS, time limits, processes
    19 Commands      the command line
"""

if __name__ == "__main__":
    # Ctrl-C before main() can catch it, as during the imports, ends the program without a word.
    import os
    import sys
    sys.excepthook = lambda kind, *error: (
        os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error))

import argparse
import base64
import bisect
import calendar
import collections
import concurrent.futures
import contextlib
import email.utils
import errno
import fcntl
import functools
import getpass
import hashlib
import hmac
import html
import http
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import logging
import mmap
import operator
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
import warnings
from typing import (
    AbstractSet, Any, BinaryIO, Callable, ContextManager, Dict, FrozenSet, Iterable, Iterator, List,
    Mapping, NamedTuple, NoReturn, Optional, Pattern, Sequence, Set, Tuple, Type, Union,
)

__version__ = "0.1"

# -------------------------------------------------------------------------------------------------
# 1  Constants
#
# Media types, limits with their reasons, and the grammar of names. Nothing here does anything.
# A constant that only one room uses may stand in that room.
# -------------------------------------------------------------------------------------------------

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
# OCI 1.1 was published without this type, but ORAS 0.15 to 1.0 pushed it.
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
IMAGE_TYPES = (DOCKER_MANIFEST, OCI_MANIFEST)
INDEX_TYPES = (DOCKER_LIST, OCI_INDEX)
MANIFEST_TYPES = IMAGE_TYPES + INDEX_TYPES + (OCI_ARTIFACT,)
OCTET_STREAM = "application/octet-stream"
JSON = "application/json"

# A Content-Type that says nothing about a manifest: curl and scripts send these by default.
VAGUE_TYPES = ("", JSON, OCTET_STREAM, "application/x-www-form-urlencoded", "text/plain")

# Layers that a registry need not have: Windows base layers, and others whose licence forbids to
# distribute them.
FOREIGN_LAYER_TYPES = re.compile(
    r"application/vnd\.(docker\.image\.rootfs\.foreign\.|oci\.image\.layer\.nondistributable\.).*")

IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json",
                 "application/vnd.docker.container.image.v1+json")
# Layers of files, which a client unpacks and runs.
LAYER_TYPES = re.compile(r"application/vnd\.(?:oci\.image\.layer|docker\.image\.rootfs)\.")

# Manifests and names
MAX_MANIFEST = 4 << 20       # bytes; the specification asks for 4 MB, Distribution takes 4 MiB
MAX_DEPTH = 100              # levels of JSON; Python's own limit differs by version and caller
MAX_NAME = 255               # characters; clients and file systems take no more
MAX_DESCRIBED = 1000         # manifests that are read to compute the size of an index
MAX_TYPES = 10000            # manifests whose media type a process remembers
INDEXED_REPOSITORIES = 64    # repositories whose referrers a process keeps in memory

# Requests and responses
MAX_REQUEST_LINE = 8 << 10   # bytes; pushing a manifest with ten tags of 128 characters takes 2 KiB
MAX_HEAD = 64 << 10          # bytes of request line and headers; a bearer token can take 16 KiB
MAX_CHUNK_LINE = 1 << 10     # bytes of a chunk's size line, with extensions, which nobody sends
MAX_DRAIN = 256 << 10        # bytes of a refused body that are read, to keep the connection
MAX_LINGER = 64 << 20        # bytes that are read before closing, so that the response arrives
COPY_BUFFER = 256 << 10      # bytes per copy from file to file, and per write of an upload
MAX_UPLOAD_READ = 640 << 10  # bytes of an upload that one call reads, if the network is that fast
SMALL_BLOB = 64 << 10        # bytes; up to this, a blob goes out in one write with its headers,
                             # and the response may be cached
MAX_CACHED = 16 << 20        # bytes of responses that one worker caches
CACHE_LIFE = 1.0             # seconds; a token's end or a new rule takes effect within this time
PAGE_SIZE = 1000             # entries per page of the catalog or of referrers; n may ask for less
ROWS = 100                   # entries in one table of the web page
LARGEST = 20                 # repositories that the web page lists by their size
PAGE_PATIENCE = 1.0          # seconds that the web page may wait for a new measurement of the store
MAX_PAGE_READ = 2 << 20      # bytes of manifests that a web page reads to find those without a tag
CLIENT_LEFT = 499            # status in logs if the client did not wait for one, as in nginx's

# Connections
TICK = 5.0                   # seconds between two checks of a waiting connection's time limits
# No client has more in one worker, so that one laptop can't starve a room; but this machine has
# no such limit, because a proxy may run on it.
MAX_CONNECTIONS = 256        # connections
MAX_UPLOADS = 1000           # upload sessions
MAX_ALL_CONNECTIONS = 4096   # per worker, as each has a thread; fewer if few files may be open
SPARE_THREADS = 16           # threads per listening socket that wait; others end after their work
IDLE_LIMIT = 60.0            # seconds that a kept connection may wait for its next request
HEAD_LIMIT = 20.0            # seconds from a request's first byte to the end of its headers
HANDSHAKE_LIMIT = 20.0       # seconds that a TLS handshake may take
LINGER_LIMIT = 5.0           # seconds to read what a refused client is still sending
PACE_WINDOW = 30.0           # seconds in which a body, in or out, must move …
PACE_BYTES = 30 << 10        # … so many bytes: 1 KiB a second

# The store
SETTLING_TIME = 2.0          # seconds; two changes of a folder in one clock tick look like one
HASHED_SESSIONS = 1024       # upload sessions whose hash is in memory; others are read again
TOUCH_AGAIN_AFTER = 60.0     # seconds; a link that is younger is not touched again for a client
UPLOAD_STEP = 16 << 20       # bytes of an upload after which its quota is looked at again
UPLOAD_IDLE = 24 * 3600.0    # seconds without a write after which an upload session is deleted
GRACE_HOURS = 1              # hours that gc keeps what was pushed or asked for, by default
SWEEP_BATCH = 64             # folders that gc deletes per exclusive lock: some milliseconds
CLOCK_SLACK = 60.0           # seconds by which the clocks of hosts that share a store may differ
IMPLAUSIBLE_AGE = 180 * 86400.0  # seconds; if the newest tag is older, gc doubts the clock
MIN_FREE_SPACE = 64 << 20    # bytes; with less free space, a server says that it is not ready
USAGE_LIFE = 5.0             # seconds that a measurement is used, or 50 times what it took
ROOT_CHECK_PERIOD = 1.0      # seconds between two checks that the store still exists
UPKEEP_PERIOD = 3600.0       # seconds between two searches for idle upload sessions
JOURNAL_SIZE = 256 << 10     # bytes after which a journal is settled, and another one begun
SMALL_FILE = 32 << 10        # bytes; up to this, a blob or manifest goes into the journal
SYNCS_AT_ONCE = 32           # threads that settle a journal on a slow disk, which may sync many

# Observation
MAX_LIVE = 1 << 20           # bytes of the file behind /live; then it begins anew
MAX_EVENTS = 10000           # notifications that wait for one endpoint
NOTIFY_LIMIT = 15.0          # seconds that an endpoint may take for one notification
NOTIFY_POLL = 0.2            # seconds between two searches for events of other processes

# The grammar of distribution-spec, "Pulling manifests"; names are as in Docker's references, too.
NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
                  r"(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
HOST = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
                  r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*(?::[0-9]{1,5})?")
SESSION_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
COUNT = re.compile(r"[0-9]{1,18}")
ALGORITHMS = ("sha256", "sha512")

logger = logging.getLogger("tinyreg")

# -------------------------------------------------------------------------------------------------
# 2  Errors
#
# What a client may be told is raised as RegistryError, by parsers and stores alike; ERRORS has the
# HTTP status of each code. Any other OSError means that the host failed; other exceptions are bugs.
# What a person at the command line is told is a CommandError.
# -------------------------------------------------------------------------------------------------

# (status, message) for a host that fails while it stores something. The client may try again later,
# and docker does so by itself; 507 is "Insufficient Storage".
HOST_FAILURES = {
    errno.ENOSPC: (507, "the store is full: no space left on the registry's disk"),
    errno.EDQUOT: (507, "the store is full: the registry's disk quota is used up"),
    errno.EFBIG:  (507, "the store is full: the blob is larger than a file may be on the "
                        "registry's disk"),
    errno.EROFS:  (503, "the registry's disk is read-only"),
    errno.EIO:    (503, "the registry's disk failed"),
    errno.ESTALE: (503, "the registry's network disk lost sight of a file"),
    errno.EMFILE: (503, "the registry has too many files open"),
    errno.ENFILE: (503, "the registry's host has too many files open"),
}
# What FUSE file systems, CephFS and NFS say while they can't reach their servers.
HOST_FAILURES.update(dict.fromkeys(
    (errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN,
     errno.ENODEV, getattr(errno, "EBADFD", errno.ENOTCONN)),
    (503, "the registry's network disk is away")))


def to_json(value: Any) -> bytes:
    """The value as one line of JSON. It is ASCII, because a stray surrogate has no UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def detail_text(detail: Any) -> str:
    """A detail of an error for people: {"wanted": 1, "got": 2} is `wanted 1, got 2`."""
    if isinstance(detail, dict):
        return ", ".join("%s %s" % entry for entry in detail.items())
    return str(detail)


class RegistryError(Exception):
    """A refusal in the client's terms: an OCI error code, its HTTP status, a message and details.

    RegistryError(CODE) makes an instance of the class that ERRORS has for the code. So a caller
    that goes on if something is missing catches Unknown, and compares no codes. Each detail becomes
    an entry in the response's list of errors, as MANIFEST_BLOB_UNKNOWN needs it."""

    def __new__(cls, code: str, *details: Any, **settings: Any) -> "RegistryError":
        return super().__new__(ERRORS[code].kind if cls is RegistryError else cls)

    def __init__(self, code: str, *details: Any, message: Optional[str] = None,
                 status: Optional[int] = None, headers: Iterable[Tuple[str, str]] = ()) -> None:
        self.code = code
        self.details = details
        self.message = message or ERRORS[code].message
        self.status = status or ERRORS[code].status
        self.headers = list(headers)
        super().__init__(": ".join([self.message] + [detail_text(detail) for detail in details]))

    @classmethod
    def too_many(cls, wait: int, message: str) -> "RegistryError":
        """TOOMANYREQUESTS, which asks the client to wait so many seconds."""
        return cls("TOOMANYREQUESTS", message=message, headers=[("Retry-After", str(wait))])

    def body(self) -> bytes:
        """The JSON that distribution-spec's "Error Codes" prescribes."""
        entry = {"code": self.code, "message": self.message}
        entries = [dict(entry, detail=detail) for detail in self.details]
        return to_json({"errors": entries or [entry]})


class Unknown(RegistryError):
    """A repository, manifest, blob or upload session is not there."""


class Invalid(RegistryError):
    """The client sent something malformed, or its content is not what it announced."""


class DigestInvalid(Invalid):
    """A digest is malformed, or is not the content's."""


class RangeInvalid(Invalid):
    """A range does not exist, or a chunk does not begin at the end of the upload."""


class BlobsMissing(RegistryError):
    """A manifest needs blobs or manifests that the repository lacks; the details are their
    digests."""


class Refused(RegistryError):
    """The client may not do this, or not without a password."""


class Unsupported(RegistryError):
    """This registry can't do this, whoever asks."""


class Unavailable(RegistryError):
    """A host, a disk or a network failed, or is overloaded: it may work later."""


class ErrorKind(NamedTuple):
    """What an OCI error code stands for: the class to catch, the HTTP status, a default message."""

    kind: Type[RegistryError]
    status: int
    message: str


ERRORS = {  # by the OCI code (distribution-spec, "Error Codes")
    "BLOB_UNKNOWN": ErrorKind(Unknown, 404, "blob unknown to registry"),
    "BLOB_UPLOAD_INVALID": ErrorKind(Invalid, 400, "blob upload invalid"),
    "BLOB_UPLOAD_UNKNOWN": ErrorKind(Unknown, 404, "blob upload unknown to registry"),
    "DIGEST_INVALID": ErrorKind(
        DigestInvalid, 400, "provided digest did not match uploaded content"),
    "MANIFEST_BLOB_UNKNOWN": ErrorKind(
        BlobsMissing, 400, "manifest references a manifest or blob unknown to registry"),
    "MANIFEST_INVALID": ErrorKind(Invalid, 400, "manifest invalid"),
    "MANIFEST_UNKNOWN": ErrorKind(Unknown, 404, "manifest unknown to registry"),
    "NAME_INVALID": ErrorKind(Invalid, 400, "invalid repository name"),
    "NAME_UNKNOWN": ErrorKind(Unknown, 404, "repository name not known to registry"),
    "SIZE_INVALID": ErrorKind(Invalid, 400, "provided length did not match content length"),
    "UNAUTHORIZED": ErrorKind(Refused, 401, "authentication required"),
    "DENIED": ErrorKind(Refused, 403, "requested access to the resource is denied"),
    "UNSUPPORTED": ErrorKind(Unsupported, 405, "the operation is unsupported"),
    "TOOMANYREQUESTS": ErrorKind(Unavailable, 429, "too many requests"),
    # Codes of Distribution, for errors that the specification does not have.
    "RANGE_INVALID": ErrorKind(RangeInvalid, 416, "the range does not fit what is there"),
    "UNAVAILABLE": ErrorKind(Unavailable, 503, "the registry can't do this at the moment"),
    "UNKNOWN": ErrorKind(Unavailable, 500, "the registry failed; its log says why"),
}


class CommandError(argparse.ArgumentTypeError):
    """A command can't do its work. The message is one line for the person at the command line, and
    says what to do. argparse shows it for a wrong option."""


class ClientLeft(Exception):
    """The client closed its connection, or moved too slowly, within a request or a response."""

# -------------------------------------------------------------------------------------------------
# 3  Values
#
# Digest, name, tag, reference, byte range, address, glob; manifests and what they refer to. Most
# rules of the specification are here. There is no input and output: a parser takes text and
# returns a checked value or raises RegistryError.
# -------------------------------------------------------------------------------------------------


class Digest(str):
    """A checked digest, as links and manifests have it: `sha256:abcd…`."""

    __slots__ = ()
    tag: Optional[str] = None

    @property
    def algorithm(self) -> str:
        return self[:6]  # both algorithms have names of six letters

    @property
    def encoded(self) -> str:
        return self[7:]

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> "Digest":
        """The digest of these bytes."""
        return cls("%s:%s" % (algorithm, hashlib.new(algorithm, content).hexdigest()))


class TaggedDigest(Digest):
    """The digest of NAME:TAG@DIGEST. The digest chooses the manifest; `tag` is stored with it."""

    def __new__(cls, digest: Digest, tag: str) -> "TaggedDigest":
        value = super().__new__(cls, digest)
        value.tag = tag
        return value


# Text for people

# Control characters, half surrogates, and characters that are invisible or turn a line's direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
                    "\ud800-\udfff\ufeff\U000e0000-\U000e007f]")


def harmless(text: str) -> str:
    """A stranger's text for a terminal, a log or the web page. Escapes replace the characters that
    break a line, turn its direction or move the cursor."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def counted(number: int, noun: str) -> str:
    """A number of things: 1 blob, 2 blobs, 3 repositories."""
    return "1 " + noun if number == 1 else "%d %ss" % (number, re.sub("y$", "ie", noun))


def in_units(size: float) -> str:
    """A number of bytes for people: 1.5 GiB."""
    if size < 1024:
        return "%d B" % size
    power = min((int(size).bit_length() - 1) // 10, 4)
    return "%.1f %siB" % (size / 1024.0 ** power, " KMGT"[power])


def shorten(reference: str) -> str:
    """A digest cut to twelve digits, as people write it; or a tag as it is."""
    return reference[:19] + "…" if ":" in reference else reference


# Names and references

def _check(pattern: Pattern, text: str, code: str, message: Optional[str] = None,
           status: Optional[int] = None) -> str:
    """The text, if all of it fits the pattern. Else raises the code; its detail is the begin of the
    text."""
    if not pattern.fullmatch(text):
        raise RegistryError(code, text[:MAX_NAME], message=message, status=status)
    return text


def parse_algorithm(text: str) -> str:
    """Raises DIGEST_INVALID unless the algorithm is sha256 or sha512."""
    return _check(re.compile("|".join(ALGORITHMS)), text, "DIGEST_INVALID",
                  "unsupported digest algorithm; use sha256 or sha512")


def parse_digest(text: str) -> Digest:
    """Raises DIGEST_INVALID; the message tells an unknown algorithm from a malformed digest."""
    if ":" in text and not DIGEST.fullmatch(text):
        parse_algorithm(text.partition(":")[0])
    return Digest(_check(DIGEST, text, "DIGEST_INVALID", "invalid digest"))


def parse_name(text: str) -> str:
    """The name of a repository. Raises NAME_INVALID."""
    if len(text) > MAX_NAME:
        raise RegistryError("NAME_INVALID", text[:MAX_NAME] + "…",
                            message="repository name longer than 255 characters")
    return _check(NAME, text, "NAME_INVALID",
                  "invalid repository name: components of lower-case letters and digits, "
                  "joined by single separators . _ __ or -, with / between them")


def parse_tag(text: str) -> str:
    """Raises MANIFEST_INVALID, because the specification has no code for tags."""
    return _check(TAG, text, "MANIFEST_INVALID",
                  "invalid tag: at most 128 letters, digits, underscores, full stops and hyphens, "
                  "the first no full stop or hyphen")


Reference = Union[str, Digest]  # a tag or a digest


def parse_reference(text: str) -> Reference:
    """A tag or a Digest. Raises DIGEST_INVALID, MANIFEST_INVALID."""
    return parse_digest(text) if ":" in text else parse_tag(text)


def parse_session_id(text: str) -> str:
    """The UUID of an upload session; Distribution's are UUIDs too. Raises BLOB_UPLOAD_UNKNOWN."""
    return _check(SESSION_ID, text, "BLOB_UPLOAD_UNKNOWN")


def parse_count(text: str) -> int:
    """The `n` of a listing. Raises UNSUPPORTED with status 400."""
    return int(_check(COUNT, text, "UNSUPPORTED", "n must be a whole number, 0 or more",
                      status=400))


# Images

def image_text(name: str, reference: Reference) -> str:
    """NAME:TAG, NAME@DIGEST or NAME:TAG@DIGEST, as split_image reads it."""
    if not isinstance(reference, Digest):
        return "%s:%s" % (name, reference)
    return "%s%s@%s" % (name, ":" + reference.tag if reference.tag else "", reference)


# The tag that fallback_tag makes, or one of cosign's, which adds .sig, .att or .sbom to it.
FALLBACK_TAG = re.compile(r"(sha256|sha512)-([0-9a-f]{64})(?:\..*)?")


def fallback_tag(subject: Digest) -> str:
    """The tag of the index that lists the referrers of a manifest where there is no referrers API
    (distribution-spec, "Referrers Tag Schema"). It is cut, because a tag has 128 characters."""
    return subject.replace(":", "-")[:71]


def split_reference(text: str) -> Tuple[str, Union[None, str, Digest]]:
    """NAME[:TAG][@DIGEST] as (name, reference). The name is unchecked; the reference is None if
    there is none. Raises MANIFEST_INVALID, DIGEST_INVALID."""
    rest, at, digest = text.partition("@")
    name, colon, tag = rest.partition(":")
    if colon:
        parse_tag(tag)
    if not at:
        return name, tag if colon else None
    return name, TaggedDigest(parse_digest(digest), tag) if colon else parse_digest(digest)


def split_image(text: str) -> Tuple[str, Union[None, str, Digest]]:
    """NAME[:TAG][@DIGEST] as (checked name, reference). Raises NAME_INVALID, MANIFEST_INVALID,
    DIGEST_INVALID."""
    name, reference = split_reference(text)
    return parse_name(name), reference


class Image(NamedTuple):
    """An image of another registry: the repository that has it in our store, its tag or Digest,
    that registry's host, and the repository there."""

    stored_name: str
    reference: Reference
    host: str
    path: str


def origin_of(host: str) -> str:
    """The first component of names from a registry. A name has no colon, so a port follows a _."""
    return host.lower().replace(":", "_")


def origin_name(host: str, path: str) -> str:
    """The repository of our store for `path` on `host`: an image keeps its origin. Raises
    NAME_INVALID."""
    return parse_name("%s/%s" % (origin_of(host), path))


def canonical_host(host: str) -> str:
    """The host of a registry. Docker Hub has several; people write docker.io."""
    return "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host


def parse_image(text: str) -> Image:
    """The Image that docker means by a text: `alpine` is library/alpine:latest on docker.io.
    Raises NAME_INVALID, MANIFEST_INVALID, DIGEST_INVALID."""
    first, slash, path = text.partition("/")
    if not slash or not (first == "localhost" or re.search("[.:A-Z]", first)):
        first, path = "docker.io", text
    elif not HOST.fullmatch(first):
        raise RegistryError("NAME_INVALID", text[:MAX_NAME],
                            message="invalid host; write HOST[:PORT]/NAME[:TAG]")
    host = canonical_host(first)
    path, reference = split_reference(path)
    if host == "docker.io" and "/" not in path:
        if re.fullmatch("[0-9a-f]{64}", path):
            raise RegistryError("NAME_INVALID", path,
                                message="64 hexadecimal digits are a digest, not a name")
        path = "library/" + path
    return Image(origin_name(host, parse_name(path)), reference or "latest", host, path)


def has_origin(name: str) -> bool:
    """Whether the name of a repository begins with the host of a registry."""
    host, slash, _ = name.partition("/")
    return bool(slash) and (host == "localhost" or "." in host or "_" in host)


def names_to_try(name: str, origin: Optional[str] = None) -> List[str]:
    """The repositories that a read of `name` may mean; the first that exists is read.

    `origin` is the registry that a mirror's client wants to reach (`ns`). With it, only HOST/NAME
    is meant: a person who may push NAME here must not answer for another registry. Without it the
    client may be an old Docker, which asks a mirror for docker.io's images, or a person who writes
    a short name: both may mean docker.io. Raises NAME_INVALID."""
    short = name if "/" in name else "library/" + name
    if origin:
        _check(HOST, origin, "NAME_INVALID", "ns must be the host of a registry: HOST[:PORT]")
        host = canonical_host(origin.lower())
        return [origin_name(host, short if host == "docker.io" else name)]
    at_docker = "docker.io/" + short
    return [name] if has_origin(name) or len(at_docker) > MAX_NAME else [name, at_docker]


# Addresses

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def without_port(text: str) -> str:
    return re.sub(r":[0-9]+\Z", "", text)


@functools.lru_cache(maxsize=256)  # each connection asks several times
def find_address(text: str) -> Optional[Address]:
    """The IP address in ADDRESS or ADDRESS:PORT, or None if it is a host name. An IPv4 address
    inside an IPv6 address is returned as IPv4."""
    for host in (text, without_port(text)):
        host = host.strip("[]").partition("%")[0] if ":" in host else host
        with contextlib.suppress(ValueError):  # a host name
            address = ipaddress.ip_address(host)
            return getattr(address, "ipv4_mapped", None) or address
    return None


def is_this_machine(text: str) -> bool:
    """Whether HOST or HOST:PORT is this machine: localhost, or a loopback address."""
    address = find_address(text)
    return address.is_loopback if address else without_port(text).lower() == "localhost"


def client_key(text: str) -> str:
    """What limits count as one client: an IPv4 address, or an IPv6 network of 64 bits, because one
    host may use all of its addresses."""
    address = find_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return "%x" % (int(address) >> 64)
    return text


def parse_network(text: str) -> Network:
    """An address or a network. Raises CommandError."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise CommandError("%r is no network: write, for example, 10.0.0.7 or 10.0.0.0/24" % text)


def is_proxy(peer: str, networks: Sequence[Network]) -> bool:
    """Whether this address may speak for others: this machine's, or one in the networks."""
    address = find_address(peer)
    return is_this_machine(peer) or any(address in network for network in networks)


def client_behind(peer: str, forwarded: str, networks: Sequence[Network]) -> str:
    """The address of the client for which `peer` speaks, by X-Forwarded-For. Each proxy adds its
    own client at the end, so it is read from the end, up to the first address of no proxy."""
    for entry in reversed(forwarded.split(",")):
        address = find_address(entry.strip())
        if not address or not is_proxy(peer, networks):
            break
        peer = str(address)
    return peer


# What requests carry

def origin_form(target: str) -> str:
    """A request's target without the scheme and host that clients of a proxy send (RFC 9112,
    3.2.2)."""
    return re.sub(r"^https?://[^/]*", "", target)


def parse_range(header: str, size: int) -> Optional[Tuple[int, int]]:
    """The byte range that a GET asks for, as (offset, length), or None for the whole blob.

    Ranges in other units are ignored, and so are several at once (RFC 9110, 14.2). An empty blob
    is sent whole, as Go's servers do. Raises RANGE_INVALID if nothing of the range exists."""
    match = re.fullmatch(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", header)
    if not match or match.groups() == ("", "") or not size:
        return None
    first, last = match.groups()
    if first:
        start = int(first)
        length = min(int(last) + 1 if last else size, size) - start
    else:
        length = min(int(last), size)
        start = size - length
    if length <= 0:  # past the end, or FIRST behind LAST, which a server "MAY ignore or reject"
        raise RegistryError("RANGE_INVALID", header,
                            headers=[("Content-Range", "bytes */%d" % size)])
    return start, length


def parse_content_range(header: str) -> Tuple[int, int]:
    """The (first, last) byte of an uploaded chunk: `0-99` as in the specification, or HTTP's
    `bytes 0-99/*`, which regclient and older clients send. Raises RANGE_INVALID."""
    match = re.fullmatch(r"(?:bytes[ =])?[ \t]*([0-9]{1,18})-([0-9]{1,18})"
                         r"(?:/(?:[0-9]{1,18}|\*))?", header)
    if not match or int(match[2]) < int(match[1]):
        raise RegistryError("RANGE_INVALID", header[:MAX_NAME],
                            message="Content-Range must be FIRST-LAST, in bytes")
    return int(match[1]), int(match[2])


# Patterns over names

class Glob:
    """A pattern over repository names: `*` stays within a component, `**` does not.

    A regular expression with several stars tries all ways to share the text among them. This class
    looks at each character once for each part of the pattern."""

    def __init__(self, glob: str) -> None:
        self.parts = re.findall(r"\*+|[^*]+", glob)

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches the whole text."""
        ends = {0}  # where in the text the parts up to here may end
        for part in self.parts:
            if part[0] != "*":
                ends = {end + len(part) for end in ends if text.startswith(part, end)}
                continue
            for place, character in enumerate(text):
                if place in ends and (character != "/" or part != "*"):
                    ends.add(place + 1)
        return len(text) in ends


@functools.lru_cache(maxsize=10000)
def parse_glob(glob: str) -> Any:
    """An object whose `fullmatch` tells whether a text fits the glob: a regular expression, which
    is the fastest, unless it has enough stars to become slow."""
    if glob.count("*") > (2 if "**" in glob else 1):
        return Glob(glob)
    return re.compile("".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part))
                              for part in re.split(r"(\*\*|\*)", glob)), re.DOTALL)


def fits_any(patterns: Iterable[Any], name: str, reference: "Reference") -> bool:
    """Whether any of some patterns fits the tag (or digest), or NAME:TAG."""
    texts = (reference, image_text(name, reference))
    return any(pattern.fullmatch(text) for pattern in patterns for text in texts)


# Manifests

Document = Dict[str, Any]  # a JSON object


class Descriptor(NamedTuple):
    """What a manifest says of content that it refers to (OCI image-spec, descriptor.md). A
    registry need not have `foreign` content. `platform` is "" but in an index."""

    media_type: str
    digest: Digest
    size: int
    foreign: bool
    platform: str


def _require(condition: Any, message: str, *details: Any) -> None:
    """Raises MANIFEST_INVALID unless the condition holds."""
    if not condition:
        raise RegistryError("MANIFEST_INVALID", *details, message=message)


def platform_name(platform: Any) -> str:
    """OS/ARCHITECTURE[/VARIANT] from an image's config, or from the platform in an index's entry;
    "" if it names none."""
    platform = platform if isinstance(platform, dict) else {}
    words = [platform.get(key) for key in ("os", "architecture", "variant")]
    return "/".join(word for word in words if word and isinstance(word, str))


def parse_descriptor(value: Any) -> Descriptor:
    """Raises MANIFEST_INVALID, DIGEST_INVALID."""
    _require(isinstance(value, dict), "a descriptor must be a JSON object")
    media_type, digest, size = value.get("mediaType", ""), value.get("digest"), value.get("size")
    _require(isinstance(media_type, str) and isinstance(digest, str),
             "a descriptor needs a mediaType and a digest, both strings")
    # A bool is an int to Python.
    _require(isinstance(size, int) and not isinstance(size, bool) and size >= 0,
             "a descriptor's size must be a number, 0 or more", digest)
    foreign = bool(value.get("urls")) or FOREIGN_LAYER_TYPES.fullmatch(media_type) is not None
    return Descriptor(media_type, parse_digest(digest), size, foreign,
                      platform_name(value.get("platform")))


def _parse_json_number(text: str) -> Union[int, float]:
    """Raises ValueError for NaN and 1e999, which other JSON parsers refuse.

    An integer of thousands of digits would take Python minutes. No size here has more than 18
    digits, so a larger integer becomes a float."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError("a number out of range")
    return int(text) if abs(value) < 1e20 and text.lstrip("-").isdigit() else value


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Document:
    """Raises ValueError if a key comes twice: readers would not agree on its value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def load_json(content: bytes, is_strict: bool = False) -> Document:
    """The JSON object in these bytes. Raises ValueError with a reason, however deep or odd the
    text is; if `is_strict`, also where an object has a key twice."""
    try:
        number = _parse_json_number
        value = json.loads(content.decode("utf-8"), parse_int=number, parse_float=number,
                           parse_constant=number,
                           object_pairs_hook=_unique_keys if is_strict else None)
    except RecursionError:
        raise ValueError("nested too deeply")
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    level: List[Any] = [value]
    for _ in range(MAX_DEPTH):
        values = [inner for outer in level
                  for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in values if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _media_type(document: Document) -> str:
    declared = document.get("mediaType")
    if isinstance(declared, str) and declared:
        return sys.intern(declared)
    if "fsLayers" in document or document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA1
    if "manifests" in document:
        return OCI_INDEX
    return OCI_MANIFEST if "config" in document or "layers" in document else ""


def _descriptors(document: Document, field: str) -> List[Descriptor]:
    values = document.get(field)
    _require(values is None or isinstance(values, list), "%s must be a list" % field)
    return [parse_descriptor(value) for value in values or []]


def _blobs(document: Document) -> List[Descriptor]:
    config = document.get("config")
    blobs = [] if config is None else [parse_descriptor(config)]
    return blobs + _descriptors(document, "layers") + _descriptors(document, "blobs")


def _subject(document: Document) -> Optional[Digest]:
    subject = document.get("subject")
    return None if subject is None else parse_descriptor(subject).digest


def _artifact_type(document: Document) -> Optional[str]:
    kind, config = document.get("artifactType"), document.get("config")
    if not kind and isinstance(config, dict):
        kind = config.get("mediaType")
    return kind if isinstance(kind, str) and kind else None


# The properties of a Manifest that are kept, and how each is read from the document.
FACTS: Dict[str, Callable[[Document], Any]] = {
    "media_type": _media_type,
    "blobs": _blobs,
    "manifests": functools.partial(_descriptors, field="manifests"),
    "subject": _subject,
    "artifact_type": _artifact_type,
}


def _read_fact(read: Callable[[Document], Any], document: Document) -> Any:
    """What `read` returns for the document, or the error that it raises."""
    try:
        return read(document)
    except Invalid as error:
        return error.with_traceback(None)  # a traceback would keep the document in memory


class Manifest:
    """The bytes of a manifest, and what they say.

    They are parsed when a property is first read. Only the properties are kept, because the parsed
    document may take thirty times the bytes. parse_manifest checks a manifest; a store makes one
    without a check, and then a malformed property raises MANIFEST_INVALID or DIGEST_INVALID when
    it is read."""

    # {digest: media type}, which never changes, so that HEAD need not parse.
    types: Dict[Digest, str] = {}

    def __init__(self, content: bytes, digest: Digest) -> None:
        self.content = content
        self.digest = digest
        self._facts: Dict[str, Any] = {}  # empty until the content has been parsed

    def _parse(self) -> Document:
        """The content as JSON; the facts are kept. Raises MANIFEST_INVALID."""
        try:
            document = load_json(self.content)
        except ValueError as error:
            raise RegistryError("MANIFEST_INVALID", self.digest,
                                message="not a manifest: %s" % error)
        self._facts = self._facts or {key: _read_fact(read, document)
                                      for key, read in FACTS.items()}
        return document

    @property
    def document(self) -> Document:
        """The content as JSON, parsed anew each time."""
        return self._parse()

    def _fact(self, key: str) -> Any:
        if not self._facts:
            self._parse()
        value = self._facts[key]
        if isinstance(value, RegistryError):
            raise value
        return value

    @property
    def media_type(self) -> str:
        """The type that the content declares, else the one that its fields show; "" if it is no
        manifest. The layout on disk has no place for a Content-Type."""
        media_type = self.types.get(self.digest)
        if media_type is None:
            media_type = self._fact("media_type")
            if len(self.types) >= MAX_TYPES:
                self.types.clear()
            if len(media_type) <= MAX_NAME:
                self.types[self.digest] = media_type
        return media_type

    @property
    def blobs(self) -> List[Descriptor]:
        """The config, the layers, and an artifact manifest's blobs, in the manifest's order."""
        return self._fact("blobs")

    @property
    def manifests(self) -> List[Descriptor]:
        """The manifests of an index. If BuildKit exported it as a cache, they are layers."""
        return self._fact("manifests")

    @property
    def subject(self) -> Optional[Digest]:
        """The manifest that this one refers to, as a signature does to an image; or None."""
        return self._fact("subject")

    @property
    def artifact_type(self) -> Optional[str]:
        """As lists of referrers have it: an image without one has the type of its config."""
        return self._fact("artifact_type")

    def referrer(self) -> Document:
        """The descriptor of this manifest in a list of referrers (distribution-spec, "Listing
        Referrers")."""
        annotations = self.document.get("annotations")
        entry = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.content)}
        if self.artifact_type:
            entry["artifactType"] = self.artifact_type
        if annotations:
            entry["annotations"] = annotations
        return entry


def _check_shape(manifest: Manifest, document: Document) -> None:
    """Raises MANIFEST_INVALID, DIGEST_INVALID unless the document has the fields of its type.

    A document that is an index and an image at once is refused, because clients would not agree
    on its meaning (CVE-2021-41190)."""
    is_index = manifest.media_type in INDEX_TYPES
    has_layers = "config" in document or "layers" in document
    _require(not has_layers if is_index else "manifests" not in document,
             "a manifest can't be an index and an image at once")
    _require(manifest.media_type not in IMAGE_TYPES or isinstance(document.get("config"), dict),
             "an image manifest needs a config")
    _require(document.get("schemaVersion", 2) == 2, "schemaVersion must be 2")
    annotations = document.get("annotations")
    _require(annotations is None or isinstance(annotations, dict)
             and all(isinstance(text, str) for text in annotations.values()),
             "annotations must be an object whose values are strings")
    _require(isinstance(document.get("artifactType") or "", str),
             "artifactType must be a string")
    for key in ("blobs", "manifests", "subject"):
        getattr(manifest, key)  # to read a property is to check it


def parse_manifest(content: bytes, content_type: str = "",
                   digest: Optional[Digest] = None) -> Manifest:
    """A pushed manifest, checked: it is JSON, has a known type, which is the announced one, and
    well-formed descriptors. `digest` is the one that it was pushed by, if any. Raises
    MANIFEST_INVALID, DIGEST_INVALID."""
    manifest = Manifest(content, Digest.of(content, digest.algorithm if digest else "sha256"))
    if digest and manifest.digest != digest:
        raise RegistryError("DIGEST_INVALID", {"wanted": digest, "got": manifest.digest})
    document = manifest.document
    media_type = manifest.media_type
    _require(not media_type.startswith("application/vnd.docker.distribution.manifest.v1+"),
             "Docker image manifest schema 1 is not accepted (Docker gave it up in 2020); push "
             "with Docker 1.10 or newer, or convert it with skopeo copy --format v2s2")
    _require(media_type in MANIFEST_TYPES,
             "not a manifest type that this registry knows; "
             "artifacts go into an OCI image manifest with an artifactType", media_type)
    announced = content_type.partition(";")[0].strip().lower()
    _require(announced in VAGUE_TYPES or announced == media_type,
             "the Content-Type announces another type than the manifest has",
             {"Content-Type": announced, "mediaType": media_type})
    _check_shape(manifest, document)
    return manifest

# -------------------------------------------------------------------------------------------------
# 4  Files
#
# The one durable write: bytes into a scratch file, fsync, rename, fsync of the folder and of every
# folder that had to be made. After a crash a name is there with all its bytes, or not at all. Also
# here: locks between processes, and the mark that changes whenever the store does. This room knows
# nothing of registries.
# -------------------------------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """Make what was written to an open file or folder durable. Raises OSError.

    On macOS fsync leaves it in the drive's cache. F_FULLFSYNC does not; SQLite and Go use it,
    too."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        return os.fsync(descriptor)
    try:
        fcntl.fcntl(descriptor, full_sync)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
            raise
        os.fsync(descriptor)  # a network's file system has no other


def give_away(descriptor: int, folder: Union[int, str]) -> None:
    """Let what root has just made in a folder belong to whom the folder belongs: else a server that
    runs as that user could not change it. Raises OSError."""
    owner = os.stat(folder)
    if owner.st_uid:
        with contextlib.suppress(PermissionError):  # a container's root, or NFS's, may not do that
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def open_owned(path: str, flags: int) -> int:
    """What open() shall open a file with: one that root makes belongs to whom its folder belongs.
    Raises OSError."""
    if flags & os.O_CREAT and not os.geteuid():
        if not flags & os.O_EXCL:
            with contextlib.suppress(FileNotFoundError):  # it is made below
                return os.open(path, flags & ~os.O_CREAT)
        # Only what is surely new is given away, for a file of that name may be a link to any other.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_EXCL, 0o666)
            give_away(descriptor, os.path.dirname(path) or ".")
            return descriptor
    return os.open(path, flags, 0o666)


class descriptor_of:
    """A file or folder that is open during a block, which gets its descriptor. It is opened as
    open_owned() does. Raises OSError. (contextlib and open() take several times as long.)"""

    def __init__(self, path: str, flags: int = os.O_RDONLY) -> None:
        self.descriptor = open_owned(path, flags)

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *error: Any) -> None:
        os.close(self.descriptor)


def sync_path(path: str) -> None:
    """Make a file's content, or the names in a folder, durable. Raises OSError."""
    with descriptor_of(path) as descriptor:
        sync(descriptor)


def sync_present(paths: Iterable[str]) -> None:
    """Make files and folders durable, if they are there. Raises OSError."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another program has deleted it
            sync_path(path)


def sync_together(paths: Sequence[str]) -> None:
    """Make files and folders durable, if they are there, several at a time if that takes long.
    Raises OSError; RuntimeError if there may be no more threads."""
    first, rest = paths[:8], paths[8:]
    began = time.monotonic()
    sync_present(first)
    if not rest or time.monotonic() - began < len(first) * 0.001:
        return sync_present(rest)  # where a disk does not wait, threads wait for each other
    parts = [rest[number::SYNCS_AT_ONCE] for number in range(SYNCS_AT_ONCE)]
    with concurrent.futures.ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(sync_present, parts))


# Held while root makes a folder: a thread that makes one inside it finds it given away.
making_directory = threading.Lock()


def make_directory(path: str) -> None:
    """Make a folder; one that root makes belongs to whom its parent belongs. Raises OSError."""
    if os.geteuid():
        return os.mkdir(path)
    with making_directory:
        os.mkdir(path)
        parent, name = os.path.split(path)
        if not os.stat(parent).st_uid:
            return
        above = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            try:
                give_away(descriptor, above)
            finally:
                os.close(descriptor)
        finally:
            os.close(above)


def make_directories(path: str, attempts: int = 10, durable: bool = True) -> bool:
    """Make a folder and its missing parents, each durable before the next is made; the folder too,
    if it shall be `durable`. Returns whether the folder is new. Raises OSError.

    If the folder exists, its parent is synced all the same: the process that made it may not have
    come to that yet. A parent may be deleted again before it is used, hence the attempts; their
    number is limited, because /proc answers "no such directory" for ever."""
    is_new = True
    try:
        make_directory(path)
    except FileNotFoundError:
        if not attempts:
            raise
        make_directories(os.path.dirname(path))
        return make_directories(path, attempts - 1, durable)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        is_new = False
    if durable:
        sync_path(os.path.dirname(path))
    return is_new


def read_file(path: str, limit: int = MAX_MANIFEST) -> Optional[bytes]:
    """The first `limit` bytes of a file (-1: all of it), or None without one. Raises OSError."""
    try:
        if limit < 0:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        with descriptor_of(path) as descriptor:
            return os.read(descriptor, limit)
    except (FileNotFoundError, NotADirectoryError):
        return None


class FileState(NamedTuple):
    """How a file looked: another state means that it was written to, touched or replaced."""

    mtime: float
    size: int
    inode: int


def look_at(path: str, opened: bool = False) -> FileState:
    """The present state of a file; zeros if there is none. Raises OSError.

    NFS may answer with what it knew of a file a minute ago, but not for one that was just opened:
    `opened` asks for that."""
    try:
        if opened:
            with descriptor_of(path) as descriptor:
                status = os.fstat(descriptor)
        else:
            status = os.stat(path)
        return FileState(status.st_mtime, status.st_size, status.st_ino)
    except (FileNotFoundError, NotADirectoryError):
        return FileState(0.0, 0, 0)


def is_at(file: BinaryIO, path: str) -> bool:
    """Whether this path still names the open file. Raises OSError."""
    return look_at(path, opened=True).inode == os.fstat(file.fileno()).st_ino


def list_directory(path: str) -> List[str]:
    """The names in a folder in ASCII order; [] if there is no such folder. Raises OSError."""
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def local_time(moment: float) -> str:
    """A Unix time for people, as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def openssl(*arguments: str, folder: Optional[str] = None, check: bool = True) -> Optional[str]:
    """Run the openssl command in a folder; returns its output.

    Raises CommandError if the command is missing or fails. Without `check` it may fail, and None is
    returned."""
    try:
        done = subprocess.run(("openssl",) + arguments, cwd=folder, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise CommandError(
            "this needs the openssl command (%s); install it, or, instead of --tls, bring your own "
            "certificate with --tls-cert and --tls-key" % error.strerror)
    output = done.stdout.decode("utf-8", "replace").strip()
    if check and done.returncode:
        raise CommandError("openssl %s failed: %s" % (arguments[0], output))
    return None if done.returncode else output


@contextlib.contextmanager
def deleted_on_error(path: str) -> Iterator[None]:
    """Delete a file that the block makes, if the block fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it was never made, or the disk failed
            os.unlink(path)
        raise


def give(content: bytes, write: Callable[[bytes], Any]) -> None:
    """For Files.fill(): write one content."""
    write(content)


class Files:
    """Durable writes and deletions, by way of a scratch folder on the same file system."""

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch

    def scratch_path(self) -> str:
        """A path in the scratch folder that nobody else uses."""
        return "%s/%s" % (self.scratch, os.urandom(16).hex())

    def write(self, path: str, content: bytes, private: bool = False) -> None:
        """Put a small file in place, as fill() does. Raises OSError.

        If the file already has this content, only its mtime is renewed."""
        if not private and read_file(path, len(content) + 1) == content:
            os.utime(path)
            return sync_path(os.path.dirname(path))
        self.fill(path, functools.partial(give, content), private)

    def fill(self, path: str, give: Callable[[Callable[[bytes], Any]], Any],
             private: bool = False) -> None:
        """Put a file in place, whole and durable, with the bytes that `give(write)` writes.

        A private file can be read by its owner only, from its first byte on; if it replaces one, it
        keeps that one's owner and group. Raises OSError, and what `give` raises."""
        temporary = self.scratch_path()
        with deleted_on_error(temporary):
            opener = functools.partial(os.open, mode=0o600) if private else None
            with open(temporary, "xb", opener=opener) as file:
                if not os.geteuid():
                    give_away(file.fileno(), self.scratch)
                if private and os.path.exists(path):
                    former = os.stat(path)
                    os.fchown(file.fileno(), former.st_uid, former.st_gid)
                    os.fchmod(file.fileno(), former.st_mode & 0o770)
                give(file.write)
                file.flush()
                sync(file.fileno())
            self.publish(temporary, path)

    @contextlib.contextmanager
    def staged(self, path: str, content: bytes, ready: str = "") -> Iterator[Callable[[], None]]:
        """Write a small file, unless the path `ready` has it, and yield what puts it in place,
        which needs no more space; nothing of it waits for the disk. What was written is deleted if
        it was not put there. Raises OSError.

        If the file already has this content, only its mtime is renewed."""
        is_new = make_directories(os.path.dirname(path), durable=False)
        if ready:
            yield functools.partial(self.publish, ready, path, durable=False)
            return
        if not is_new and read_file(path, len(content) + 1) == content:
            yield functools.partial(os.utime, path)
            return
        temporary = self.scratch_path()
        with deleted_on_error(temporary):
            with descriptor_of(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                if os.write(descriptor, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield functools.partial(self.publish, temporary, path, durable=False)

    def publish(self, temporary: str, path: str, durable: bool = True) -> None:
        """Rename a file that is written and synced to its final path, durably. Raises OSError.

        A file of that name is replaced. A deletion may take the folder away between the two system
        calls; then it is made again. If it shall not be `durable`, the folder is there already."""
        directory = os.path.dirname(path)
        if durable:
            make_directories(directory)
        while True:
            try:
                os.rename(temporary, path)
                break
            except FileNotFoundError:
                if os.path.isdir(directory) and not os.path.exists(temporary):
                    raise
                make_directories(directory)
        if durable:
            sync_path(directory)

    def probe(self) -> None:
        """Raises OSError if nothing can be written."""
        path = self.scratch_path()
        self.write(path, b"")
        os.unlink(path)

    def remove(self, path: str) -> None:
        """Delete a file, or a folder with its content, at once and durably. Raises OSError."""
        trash = self.move_to_trash(path)
        sync_path(os.path.dirname(path))
        self.empty_trash(trash)

    def move_to_trash(self, path: str) -> str:
        """Move a file or folder to the scratch folder; returns its path there. Raises OSError.

        That takes microseconds, however large it is, and no space on a full disk. The caller syncs
        the folder it came from, and then calls empty_trash()."""
        trash = self.scratch_path() + ".grave"
        os.rename(path, trash)
        return trash

    def empty_trash(self, trash: str) -> None:
        """Delete what move_to_trash() moved; two processes may do so at once."""
        try:
            os.unlink(trash)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError:  # EISDIR, EPERM: a folder
            shutil.rmtree(trash, ignore_errors=True)


class Watch:
    """Tells whether files have changed. Looks at them once a second at most; a path may be None."""

    def __init__(self, *paths: Optional[str]) -> None:
        self.paths = [path for path in paths if path]
        self.next_look = 0.0
        self.seen = self._look()

    def _look(self) -> Optional[List[FileState]]:
        """The state of all files, None if one of them can't be looked at."""
        try:
            return [look_at(path) for path in self.paths]
        except OSError:
            return None

    def changed(self) -> bool:
        """Whether a file has changed since the last call that returned True, or since the start."""
        if not self.paths or time.monotonic() < self.next_look:
            return False
        self.next_look = time.monotonic() + 1.0
        before, self.seen = self.seen, self._look()
        return self.seen != before


class ChangeMark:
    """Eight bytes of memory that all processes of a store share: another value after each change.

    A cached answer is valid while the mark has the value it was cached under. The value is random,
    not counted: of two processes that count at once, one would undo the other's change."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shared: Any = None  # the mapped file

    def open(self) -> None:
        """Make the file and map it, unless that is done. Raises OSError."""
        if self.shared is None:
            with open(self.path, "a+b", buffering=0, opener=open_owned) as file:
                if os.fstat(file.fileno()).st_size < 8:
                    # Written, not truncated to 8: on a full disk nothing could fill such a hole.
                    file.write(os.urandom(8))
                self.shared = mmap.mmap(file.fileno(), 8)

    def value(self) -> Optional[bytes]:
        """The eight bytes; None where the file can't be made, as on a read-only disk."""
        try:
            self.open()
        except OSError:
            return None
        return self.shared[:]

    def change(self) -> None:
        self.shared[:] = os.urandom(8)


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """Hold a lock file alone, among the processes that ask for it. Raises OSError.

    The file is made if it is missing, and deleted at the end."""
    is_locked = False
    while not is_locked:
        with open(path, "ab", opener=open_owned) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_locked = is_at(lock, path)  # else the holder before us has deleted it
            if is_locked:
                try:
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):  # somebody tidied up
                        os.unlink(path)


class SharedLock:
    """A lock between processes: many may share it, or one holds it alone.

    Giving it up changes the mark. flock is not fair: while new sharers keep coming, a process that
    wants the lock alone would wait for ever. So every process first passes a turnstile, and the one
    that wants the lock alone stays in it until the sharers inside have left."""

    def __init__(self, path: str, marked: bool = True) -> None:
        self.path = path
        self.mark = ChangeMark(path + ".changes") if marked else None

    @contextlib.contextmanager
    def _lock(self, how: int, changes: bool = True) -> Iterator[None]:
        if self.mark:
            self.mark.open()  # now, so that it can't fail once something has been changed
        # NFS grants a shared lock only on a file that is open for reading, too. Closing it gives
        # the lock up, and so does a kill -9.
        with descriptor_of(self.path, os.O_RDWR | os.O_CREAT) as lock:
            with descriptor_of(self.path + ".turnstile", os.O_WRONLY | os.O_CREAT) as turnstile:
                fcntl.flock(turnstile, fcntl.LOCK_EX)
                fcntl.flock(lock, how)
            try:
                yield
            finally:
                if changes and self.mark:
                    self.mark.change()

    def shared(self, changes: bool = True) -> ContextManager[None]:
        """Share the lock. `changes` says whether readers will see what is done under it."""
        return self._lock(fcntl.LOCK_SH, changes)

    def alone(self) -> ContextManager[None]:
        """Hold the lock alone."""
        return self._lock(fcntl.LOCK_EX)


class SmallFile(NamedTuple):
    """What a journal takes: where a file is to be, its content and, if that is in a file of the
    store already, the path of that file, which is moved."""

    path: str
    content: bytes
    ready: str = ""


ENTRY_HEAD = re.compile(br"(\d{1,4}) (\d{1,7})\n")  # lengths of a path and of a content


class JournalFile:
    """The file of a Journal that one process appends to, locked as long as it has it open."""

    def __init__(self, folder: str, temporary: str) -> None:
        make_directories(folder)
        self.path = os.path.join(folder, uuid.uuid4().hex)
        with deleted_on_error(temporary):
            self.file = open(temporary, "xb", buffering=0, opener=open_owned)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            os.rename(temporary, self.path)  # who sees it sees that it is locked
        sync_path(folder)
        self.process = os.getpid()
        self.paths: Set[str] = set()  # of its files
        self.users = 0    # threads whose entries are not in place yet
        self.size = 0
        self.durable = 0  # so many of its bytes are
        self.syncing = threading.Lock()
        self.failure: Optional[OSError] = None  # nothing may follow what is broken

    def is_usable(self) -> bool:
        """Whether more may be appended: this process is no child of the one that made the file, and
        nobody has deleted it."""
        return (not self.failure and self.size < JOURNAL_SIZE and self.process == os.getpid()
                and os.fstat(self.file.fileno()).st_nlink > 0)

    def append(self, entry: bytes) -> int:
        """Append bytes; returns where they end. If that fails, sync() says so."""
        end = self.size + len(entry)
        try:
            if self.file.write(entry) != len(entry):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size = end  # not before: another thread may be about to sync what it counts
        except OSError as error:
            self.failure = error
        return end

    def sync(self, end: int) -> None:
        """Make the bytes before `end` durable. Threads that wait at the same time share one sync,
        and if it fails, all hear of it: the kernel tells only once. Raises OSError."""
        with self.syncing:
            if self.durable >= end:
                return
            size = self.size
            try:
                if not self.failure:
                    sync(self.file.fileno())
            except OSError as error:
                self.failure = error
            if self.failure:
                raise self.failure
            self.durable = size

    def close(self) -> None:
        """Give it up, as far as it is sound. What is not durable was not acknowledged either."""
        if self.failure:
            with contextlib.suppress(OSError):  # the disk has failed
                self.file.truncate(self.durable)
        self.file.close()


class Journal:
    """Small files that are durable before they are in place.

    Their bytes are appended to a file of this process, which is synced once, and only then put in
    place, without waiting for the disk. A power cut may take them away from there again: who opens
    the store next writes them anew. So a file takes one wait, where six would make it, its folder
    and their names durable.

    Only what never changes goes in, like content that lies under its digest. Thus it does not
    matter in which order journals are read, nor what was written since; and `is_entry` can check a
    journal that a stranger may have made.

    A journal that is full is settled: its files are synced in their places, and it is deleted.
    Before anything is deleted all are, or they would bring it back."""

    def __init__(self, files: Files, folder: str, root: str, lock: SharedLock,
                 is_entry: Callable[[str, bytes], bool]) -> None:
        self.files = files
        self.folder = folder
        self.root = os.path.join(root, "")
        self.lock = lock
        self.is_entry = is_entry
        self.mutex = threading.Lock()  # held for moments, to change what is below
        self.current: Optional[JournalFile] = None
        self.settler = threading.Lock()  # held while a thread settles a full journal

    def write(self, files: Sequence[SmallFile]) -> None:
        """Put files in place, in this order; they are durable before the first one is. The caller
        shares the lock. Raises OSError."""
        lines = []
        for file in files:
            place = os.fsencode(file.path[len(self.root):])
            lines += [b"%d %d\n" % (len(place), len(file.content)), place, file.content]
        with contextlib.ExitStack() as stack:
            # A disk that is full should say so before the journal has it.
            places = [stack.enter_context(self.files.staged(*file)) for file in files]
            with self._durable(b"".join(lines)) as journal:
                journal.paths.update(file.path for file in files)
                for put in places:
                    put()

    @contextlib.contextmanager
    def _durable(self, entry: bytes) -> Iterator[JournalFile]:
        """Have bytes in this process's journal during the block, which puts them in place. If the
        journal is full, and nobody else uses it, it is settled then."""
        with self.mutex:
            if self.current is None or not self.current.is_usable():
                self.current = JournalFile(self.folder, self.files.scratch_path())
            journal = self.current
            journal.users += 1
            end = journal.append(entry)
        try:
            journal.sync(end)
            yield journal
        finally:
            with self.mutex:
                journal.users -= 1
                if self.current is journal and not journal.is_usable():
                    self.current = None
                is_done = self.current is not journal and not journal.users
            if is_done:
                journal.close()
            if is_done and not journal.failure and self.settler.acquire(blocking=False):
                try:
                    threading.Thread(target=self._settle_beside, args=(journal,),
                                     daemon=True).start()
                except RuntimeError:  # there may be no more threads
                    self.settler.release()
            elif is_done:  # that thread is busy: wait, so that journals don't become more and more
                self.settle(journal.path, journal.paths)

    def _settle_beside(self, journal: JournalFile) -> None:
        """Settle a journal, in the thread for that."""
        try:
            # The store may be gone. Then nothing can be done, and others say so.
            with contextlib.suppress(OSError), self.lock.shared(changes=False):
                self.settle(journal.path, journal.paths)
        finally:
            self.settler.release()

    def _read(self, path: str) -> Iterator[Tuple[str, bytes]]:
        """Yield (path, content) of a journal's whole entries: a power cut may have spoilt its end.
        Raises OSError."""
        journal = read_file(path) or b""
        head = ENTRY_HEAD.match(journal)
        while head:
            middle = head.end() + int(head[1])
            end = middle + int(head[2])
            place, content = os.fsdecode(journal[head.end():middle]), journal[middle:end]
            if end > len(journal) or not self.is_entry(place, content):
                break
            yield os.path.join(self.root, place), content
            head = ENTRY_HEAD.match(journal, end)

    def _restored(self, path: str) -> Iterator[str]:
        """Put in place what a journal has; yields its paths. Raises OSError.

        What is there already is written anew: after a failed sync the kernel may show bytes that
        it has not written. Only a full disk must do with what it has."""
        for place, content in self._read(path):
            if os.path.islink(os.path.dirname(place)):
                continue  # no store of ours has one there; it may lead anywhere
            try:
                self.files.fill(place, functools.partial(give, content))
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not is_full or read_file(place, len(content) + 1) != content:
                    raise
            yield place

    def _settle(self, path: str, paths: Iterable[str]) -> None:
        """Make the files of a journal durable, which are at these paths, and delete it. Nobody
        appends to it. Raises OSError; RuntimeError if there may be no more threads."""
        places: Set[str] = set()
        for place in paths:
            while len(place) > len(self.root) and place not in places:
                places.add(place)
                place = os.path.dirname(place)
        sync_together(list(places))
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.unlink(path)
        sync_path(self.folder)

    def settle(self, path: str, paths: Iterable[str]) -> None:
        """The same for who shares the lock: if it fails, that is logged, and the journal stays."""
        try:
            self._settle(path, paths)
        except (OSError, RuntimeError) as error:
            logger.warning("what %s has could not be stored (%s); it stays there until the next "
                           "start", path, error)

    def _iter_journals(self) -> Iterator[Tuple[str, bool]]:
        """Yield the path of each journal, and whether the process that wrote it has ended. Raises
        OSError."""
        for name in list_directory(self.folder):
            path = os.path.join(self.folder, name)
            if not os.path.isfile(path):
                continue  # settled meanwhile, or nothing of ours
            with contextlib.suppress(FileNotFoundError):  # settled just now
                # NFS locks alone only what is open for writing.
                with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as journal:
                    has_ended = True
                    try:
                        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        has_ended = False
                    yield path, has_ended

    def recover(self) -> None:
        """Settle the journals of processes that have ended. Raises OSError."""
        if list_directory(self.folder):
            with self.lock.shared():  # before they are tried, or a deletion would think they live
                for path, has_ended in self._iter_journals():
                    if has_ended:
                        self.settle(path, self._restored(path))

    def settle_all(self) -> None:
        """Settle all journals, also those of other processes. The caller holds the lock alone.
        Raises OSError: then nothing may be deleted, or it might come back."""
        for path, has_ended in self._iter_journals():
            # What a living process has put in place may be damaged since: verify should see that.
            self._settle(path, self._restored(path) if has_ended else dict(self._read(path)))
        sync_present([self.folder])  # who has deleted one may not have come to that
        if self.current:
            self.current.close()  # only then its space is free
            self.current = None

    def close(self) -> None:
        """Settle this process's journal."""
        with self.mutex:
            journal, self.current = self.current, None
        if journal and not journal.users:  # else the last of them settles it
            journal.close()
            with contextlib.suppress(OSError), self.lock.shared(changes=False):  # it is gone
                self.settle(journal.path, journal.paths)

# -------------------------------------------------------------------------------------------------
# 5  Registry
#
# The interface of everything that holds images: Reader and Writer, and wrappers that add one rule
# each to any registry. Also what needs no more than this interface: walk() over what a manifest
# leads to, and a summary of an image. Where the bytes lie is left to the rooms below.
# -------------------------------------------------------------------------------------------------

MAX_NESTING = 100  # indexes in indexes, and referrers of referrers; two or three are seen


def copy_bytes(blob: "Blob", length: int, *takers: Callable[[memoryview], Any]) -> None:
    """Hand the next `length` bytes of a blob to each of some functions, such as a file's write
    and a hash's update. Raises OSError, also if the blob ends before."""
    view = memoryview(bytearray(min(COPY_BUFFER, length)))
    while length:
        count = blob.readinto(view[:min(len(view), length)])
        if not count:
            raise OSError(errno.EIO, "a blob is shorter than it should be")
        for take in takers:
            take(view[:count])
        length -= count


class Rate:
    """Slows down those who move bytes, in any number of threads, to `limit` bytes a second in all;
    0 is no limit. Who moves no more than `piece` bytes at once waits for a short time each."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.piece = max(limit // 10, 4096) if limit else sys.maxsize
        self.free_at = 0.0  # of the monotonic clock: all that has moved may take until then
        self.mutex = threading.Lock()

    def wait(self, size: int) -> None:
        """Wait until so many bytes may have moved."""
        if self.limit:
            with self.mutex:
                now = time.monotonic()
                self.free_at = max(self.free_at, now) + size / self.limit
                pause = self.free_at - now
            time.sleep(pause)


class Blob:
    """A blob, or a part of one, as a slice of an open file: sendfile wants that, and an archive
    can give it, too. Whoever opens a blob closes it (`with`).

    The bytes of a subclass may lie in no single file: those of another registry, or of an archive
    in several parts. Then `file` is None and `readinto` is the subclass's own."""

    def __init__(self, file: Optional[BinaryIO], offset: int, length: int) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        self.position = 0  # how far readinto() has come in the slice

    def part(self, offset: int, length: int) -> "Blob":
        """The same open file, narrowed to a part of this slice."""
        part = type(self).__new__(type(self))
        vars(part).update(vars(self), offset=self.offset + offset, length=length, position=0)
        return part

    def rest(self, offset: int) -> "Blob":
        """The same open file, narrowed to this slice from `offset` on; empty past its end."""
        return self.part(offset, max(self.length - offset, 0))

    def readinto(self, view: memoryview) -> int:
        """Fill the view with the next bytes of the slice, as a file's readinto does; 0 at its end.
        Raises OSError."""
        count = min(len(view), self.length - self.position)
        if count <= 0 or self.file is None:
            return 0
        block = os.pread(self.file.fileno(), count, self.offset + self.position)
        view[:len(block)] = block
        self.position += len(block)
        return len(block)

    def read(self, limit: int = MAX_MANIFEST) -> bytes:
        """The content from its start, at most `limit` bytes. Raises OSError."""
        limit = min(limit, self.length)
        if self.file:
            return os.pread(self.file.fileno(), limit, self.offset)
        content = bytearray()
        copy_bytes(self.part(0, self.length), limit, content.extend)
        return bytes(content)

    def close(self) -> None:
        if self.file:
            self.file.close()

    def __enter__(self) -> "Blob":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def do_nothing(*arguments: Any) -> None:
    """A callback for whoever needs none."""


def unsupported(action: str) -> RegistryError:
    """The error for what a kind of registry can't do."""
    return RegistryError("UNSUPPORTED", message="this registry can't %s" % action)


class Reader:
    """The reading half of a registry.

    Repository names, tags and digests that come in are parsed values. What iterates does so in
    ASCII order, and begins after `last`. All methods but those about referrers raise NAME_UNKNOWN
    for a repository that is not there. What a registry can't do raises UNSUPPORTED."""

    is_read_only = False  # clients that want to change something are refused
    is_distant = False    # to read takes a network: what is known nearer is not read from here
    title = "the store"   # what messages call it

    def retry(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that reads from here, and return what it returns. A registry behind a
        network calls it again where that may help."""
        return action(*arguments)

    def version(self) -> Optional[bytes]:
        """A value that differs after every change, for cached responses; None if nothing may be
        cached."""
        return None

    def check_ready(self, to_write: bool = True) -> None:
        """Raises OSError or UNAVAILABLE if a read would fail now, or a write (if `to_write`)."""

    def repositories(self, last: str = "") -> Iterator[str]:
        """The names of the repositories that have, or had, a manifest."""
        raise unsupported("list repositories")

    def has_repository(self, name: str) -> bool:
        """Whether anything has been stored under this name."""
        return name in self.repositories()

    def tags(self, name: str, last: str = "") -> Iterator[str]:
        """Raises NAME_UNKNOWN when it is called, not at the first tag."""
        raise unsupported("list tags")

    def resolve(self, name: str, tag: str) -> Digest:
        """The digest that a tag points to. Raises MANIFEST_UNKNOWN."""
        raise unsupported("resolve tags")

    def manifest(self, name: str, digest: Digest) -> Manifest:
        """Its bytes are checked against the digest. Raises MANIFEST_UNKNOWN."""
        raise unsupported("give manifests")

    def manifests(self, name: str) -> Iterator[Manifest]:
        """The manifests of a repository that can be read, in no order."""
        raise unsupported("list manifests")

    def open_blob(self, name: str, digest: Digest, offset: int = 0) -> Blob:
        """The bytes of a blob from `offset` on; none if it ends before. Raises BLOB_UNKNOWN."""
        raise unsupported("give blobs")

    def referrers(self, name: str, subject: Digest, last: str = "") -> Iterator[Manifest]:
        """The manifests that have this subject, in the order of their digests."""
        raise unsupported("list referrers")

    def referrer_digests(self, name: str, subject: Digest) -> List[Digest]:
        """The digests of the referrers. A registry behind a network reads no manifest for that."""
        return [manifest.digest for manifest in self.referrers(name, subject)]

    def may_have_tag(self, name: str, tag: str) -> bool:
        """False if it is known without a question that a repository lacks a tag such as
        fallback_tag() or cosign makes of a digest."""
        return True

    def digests(self, name: Optional[str] = None) -> Iterator[Digest]:
        """The digests of all blobs and manifests: of one repository, or of all."""
        raise unsupported("list digests")

    def usage(self, longest: float = float("inf")) -> Optional[Dict[str, Any]]:
        """What takes how much space, as Directory.measure() says, up to some minutes ago; None if
        nobody knows. If the last measurement took more than `longest` seconds it is not renewed,
        however old it is."""
        return None

    def pushed(self, name: str, reference: Reference) -> float:
        """Unix time when a tag was last pushed, pulled or loaded, or a manifest by its digest
        alone; 0.0 if that is unknown."""
        return 0.0

    def history(self, name: str, tag: str) -> List[Tuple[Digest, float]]:
        """What a tag has pointed to, and the Unix time when it was last moved there: first what it
        points to now, then the latest. Raises MANIFEST_UNKNOWN."""
        return [(self.resolve(name, tag), self.pushed(name, tag))]

    def is_named(self, name: str, digest: Digest) -> bool:
        """Whether to pin a copy that was made of this manifest by its digest. False only in an
        archive of a registry's tree, for a manifest that neither a tag nor a pin names there."""
        return True

    def at_hand(self) -> Any:
        """The registry that answers without asking others; PullThrough's is its store."""
        return self

    def find_damage(self, digest: Digest) -> bool:
        """Whether a blob that arrived damaged is damaged here, too; False if that is unknown."""
        return False


class UploadSession:
    """An upload that is under way. Its first `offset` bytes have come.

    `state` is a signed text that the client carries from one request to the next."""

    name = ""  # of the repository
    id = ""
    offset = 0
    state = ""

    def append(self, body: Any, start: Optional[int] = None) -> None:
        """Add all that the body's readinto() gives. Raises RANGE_INVALID unless `start`, if it is
        given, is the offset."""
        raise unsupported("take uploads")

    def commit(self, digest: Digest) -> None:
        """Make the bytes a blob of the repository; the session ends in any case. Raises
        DIGEST_INVALID."""
        raise unsupported("take uploads")

    def cancel(self) -> None:
        """End the session and forget its bytes."""
        raise unsupported("take uploads")


class Writer:
    """The writing half of a registry. What a registry can't do raises UNSUPPORTED."""

    def start_upload(self, name: str, algorithm: str = "sha256") -> UploadSession:
        """A new upload session, whose digest will be of this algorithm, as far as is known."""
        raise unsupported("take uploads")

    def find_upload(self, name: str, session_id: str) -> UploadSession:
        """The session of this id. Raises BLOB_UPLOAD_UNKNOWN."""
        raise RegistryError("BLOB_UPLOAD_UNKNOWN", session_id)

    def has_upload(self, name: str, session_id: str) -> bool:
        """Whether an upload session is still open."""
        return False

    def put_blob(self, name: str, digest: Digest, open_from: Callable[[int], Blob]) -> None:
        """Store a blob; `open_from(offset)` opens what follows that offset.

        Goes on where an earlier attempt ended, in whatever process that was. Raises
        DIGEST_INVALID, and what `open_from` raises."""
        raise unsupported("take blobs")

    def mount(self, name: str, digest: Digest, source: Optional[str] = None) -> bool:
        """Give a repository a blob that the repository `source` has, or that any has if it is
        None. False if there is no such blob."""
        raise unsupported("take blobs")

    def put_manifest(self, name: str, manifest: Manifest, tags: Iterable[str] = (),
                     check_wanted: Callable[[], None] = do_nothing) -> None:
        """Store a manifest and let the tags point to it. Raises MANIFEST_BLOB_UNKNOWN.

        If its own digest is among the tags, the manifest is pinned: it stays as if it had a tag.
        While a store has to read blobs for this it calls `check_wanted`, and ends if that
        raises."""
        raise unsupported("take manifests")

    def delete_tag(self, name: str, tag: str) -> None:
        """Raises MANIFEST_UNKNOWN."""
        raise unsupported("delete tags")

    def delete_manifest(self, name: str, digest: Digest) -> None:
        """Delete a manifest, and all tags that point to it. Raises MANIFEST_UNKNOWN."""
        raise unsupported("delete manifests")

    def delete_blob(self, name: str, digest: Digest) -> None:
        """Take a blob from a repository. Raises BLOB_UNKNOWN."""
        raise unsupported("delete blobs")

    def present_bytes(self, name: str, blob: Descriptor) -> int:
        """How many bytes of a blob are here, so that mount() or put_blob() does not ask for
        them."""
        return 0

    def free_space(self) -> Optional[int]:
        """How many bytes can still be stored; None if nobody knows."""
        return None


class Registry(Reader, Writer):
    """A registry that is read and written."""


def walk(roots: Iterable[Digest], read: Callable[[Digest], Optional[Manifest]],
         leads_to: Callable[[Manifest], Iterable[Digest]]) -> Iterator[Manifest]:
    """Yield each manifest that the roots lead to once, after all that it leads to itself.

    `read(digest)` returns None for a manifest that may be left out. Raises MANIFEST_INVALID where
    manifests are nested too deeply, and what `read` and `leads_to` raise."""
    seen: Set[Digest] = set()

    def visit(digest: Digest, depth: int) -> Iterator[Manifest]:
        if digest in seen:
            return
        if depth > MAX_NESTING:
            raise RegistryError("MANIFEST_INVALID", digest,
                                message="indexes in indexes without end")
        seen.add(digest)
        manifest = read(digest)
        if manifest:
            for reached in leads_to(manifest):
                yield from visit(reached, depth + 1)
            yield manifest

    for root in roots:
        yield from visit(root, 0)


def child_digests(manifest: Manifest) -> List[Digest]:
    """The manifests that an index leads to. In an index as which BuildKit has exported its cache
    they are layers. Raises MANIFEST_INVALID, DIGEST_INVALID."""
    return [child.digest for child in manifest.manifests]


def resolve_reference(registry: Reader, name: str, reference: Reference) -> Digest:
    """The digest that a tag or a digest means. Raises NAME_UNKNOWN, MANIFEST_UNKNOWN."""
    return reference if isinstance(reference, Digest) else registry.resolve(name, reference)


def delete_reference(registry: Writer, name: str, reference: Reference) -> None:
    """Delete a tag, or a manifest with all tags that point to it. Raises NAME_UNKNOWN,
    MANIFEST_UNKNOWN."""
    if isinstance(reference, Digest):
        registry.delete_manifest(name, reference)
    else:
        registry.delete_tag(name, reference)


def iter_tags(registry: Reader, name: str,
              is_meant: Callable[[str], bool] = bool) -> Iterator[Tuple[str, Digest]]:
    """Yield each tag of a repository that is meant, and the digest that it points to. Raises
    NAME_UNKNOWN."""
    for tag in filter(is_meant, registry.tags(name)):
        with contextlib.suppress(Unknown):  # it was just deleted, or its link is damaged
            yield tag, registry.resolve(name, tag)


def find_readable(registry: Reader, name: str, digest: Digest) -> Optional[Manifest]:
    """A manifest whose blobs and children can be listed; None if it is missing or malformed."""
    with contextlib.suppress(Unknown, Invalid):  # left out; or stored so by another program
        manifest = registry.manifest(name, digest)
        _ = manifest.blobs, manifest.manifests  # to read them is to check them
        return manifest
    return None


# Wrappers

def define_all(wrapper: type, interface: type, make: Callable[[str], Callable[..., Any]]) -> None:
    """Define every method of an interface in a wrapper; `make(name)` returns the function."""
    for name, method in vars(interface).items():
        if callable(method) and not name.startswith("_"):
            setattr(wrapper, name, make(name))


def consists_of(registry: Reader, name: str, root: Digest) -> Set[Digest]:
    """The digests of a manifest and of all blobs and manifests that it leads to, as far as they can
    be read."""
    digests = {root}
    for manifest in walk([root], functools.partial(find_readable, registry, name), child_digests):
        digests.update(part.digest for part in manifest.blobs + manifest.manifests)
    return digests


class Wrapper(Registry):
    """A registry that passes every call on to another one, `inner`. A subclass overrides the
    methods for which it has a rule of its own."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner
        self.is_read_only = inner.is_read_only
        self.is_distant = inner.is_distant


def passed_on(name: str) -> Callable[..., Any]:
    """A method of Wrapper that calls the inner registry's method of this name."""
    def call_inner(self: Wrapper, *arguments: Any, **named: Any) -> Any:
        return getattr(self.inner, name)(*arguments, **named)
    return call_inner


define_all(Wrapper, Reader, passed_on)
define_all(Wrapper, Writer, passed_on)


class ReadOnly(Wrapper):
    """Refuses all that writes."""

    def __init__(self, inner: Registry) -> None:
        super().__init__(inner)
        self.is_read_only = True

    def check_ready(self, to_write: bool = False) -> None:
        self.inner.check_ready(False)


def refuse(self: ReadOnly, *arguments: Any, **named: Any) -> None:
    """What ReadOnly has for every method that writes. Raises DENIED."""
    raise RegistryError("DENIED", message="this registry is read-only at present")


define_all(ReadOnly, Writer, lambda name: refuse)


class ImmutableTags(Wrapper):
    """A tag that matches one of the patterns can be pushed once; it is neither moved nor deleted,
    and what it leads to is not deleted either. Patterns are of TAG or NAME:TAG.

    `lock(name)` keeps other processes from pushing such tags to the repository, and from deleting
    there: of two first pushes of a tag at once one must be the second, and no deletion may come
    between the check and a push."""

    def __init__(self, inner: Registry, patterns: Sequence[Any],
                 lock: Callable[[str], ContextManager[None]]) -> None:
        super().__init__(inner)
        self.here = inner.at_hand()  # what is to be protected: no other registry is asked
        self.patterns = patterns
        self.lock = lock

    def is_immutable(self, name: str, tag: str) -> bool:
        return fits_any(self.patterns, name, tag)

    def _check_movable(self, name: str, tag: str, digest: Optional[Digest] = None) -> None:
        """Raises DENIED if the tag points to anything but this digest, MANIFEST_UNKNOWN if it
        does not exist."""
        if self.here.resolve(name, tag) != digest:
            raise RegistryError("DENIED", message="the tag %s can't be moved or deleted "
                                "(--immutable-tags); push another one" % tag)

    def put_manifest(self, name: str, manifest: Manifest, tags: Iterable[str] = (),
                     check_wanted: Callable[[], None] = do_nothing) -> None:
        tags = list(tags)
        immutable = [tag for tag in tags if self.is_immutable(name, tag)]
        with self.lock(name) if immutable else contextlib.ExitStack():
            for tag in immutable:
                with contextlib.suppress(Unknown):  # this is the first push
                    self._check_movable(name, tag, manifest.digest)
            self.inner.put_manifest(name, manifest, tags, check_wanted)

    def delete_tag(self, name: str, tag: str) -> None:
        if self.is_immutable(name, tag):
            self._check_movable(name, tag)  # raises in any case
        self.inner.delete_tag(name, tag)

    def _check_unneeded(self, name: str, digest: Digest) -> None:
        """Raises DENIED if an immutable tag leads to this manifest or blob."""
        with contextlib.suppress(Unknown):  # the repository has no manifest
            is_immutable = functools.partial(self.is_immutable, name)
            for tag, root in iter_tags(self.here, name, is_immutable):
                if digest in consists_of(self.here, name, root):
                    raise RegistryError("DENIED", message="the tag %s needs it, and is not to "
                                        "change (--immutable-tags)" % tag)

    def delete_manifest(self, name: str, digest: Digest) -> None:
        with self.lock(name):
            self._check_unneeded(name, digest)
            self.inner.delete_manifest(name, digest)

    def delete_blob(self, name: str, digest: Digest) -> None:
        with self.lock(name):
            self._check_unneeded(name, digest)
            self.inner.delete_blob(name, digest)


# Summaries

def read_config(registry: Reader, name: str, manifest: Manifest) -> Dict[str, Any]:
    """The config of an image, unchecked; {} if it has none, or none that can be read."""
    try:
        with registry.open_blob(name, manifest.blobs[0].digest) as blob:
            return load_json(blob.read())
    except (Unknown, Invalid, ValueError, IndexError):
        return {}


NO_PLATFORM = "unknown/unknown"  # what BuildKit says that its attestations are for


def describe(registry: Reader, name: str, digest: Digest) -> Dict[str, Any]:
    """What people want to know of a manifest, as a dict for JSON.

    digest, mediaType; platforms, a list; created, when it was built, or None; count and size, the
    number and the bytes of the blobs and manifests that it consists of, each counted once;
    missing, how many children are not here, as of an index that was copied for some platforms
    only. Raises NAME_UNKNOWN, MANIFEST_UNKNOWN."""
    root = registry.manifest(name, digest)
    created = None
    platforms: List[str] = []
    sizes: Dict[Digest, int] = {}
    named: Dict[Digest, str] = {}  # the platforms that indexes name, for configs that are not here
    missing = []
    reads = iter(range(MAX_DESCRIBED))  # at most so many manifests are read

    def read(child: Digest) -> Optional[Manifest]:
        if child == digest:
            return root  # a malformed one raises
        if next(reads, None) is None:
            return None
        manifest = find_readable(registry, name, child)
        if not manifest:
            missing.append(child)
        return manifest

    def children(manifest: Manifest) -> Iterator[Digest]:
        for child in manifest.manifests:
            named[child.digest] = child.platform
            if child.media_type in MANIFEST_TYPES:
                yield child.digest
            else:  # BuildKit exports its cache as an index of layers
                sizes[child.digest] = child.size

    for manifest in walk([digest], read, children):
        sizes[manifest.digest] = len(manifest.content)
        sizes.update((blob.digest, blob.size) for blob in manifest.blobs)
        if manifest.media_type in IMAGE_TYPES:
            config = read_config(registry, name, manifest)
            created = created or config.get("created")
            platform = (platform_name(config) or named.get(manifest.digest)
                        or manifest.artifact_type or "-")
            if platform in IMAGE_CONFIGS:  # the config is not here
                platform = "-"
            if platform not in platforms + [NO_PLATFORM]:
                platforms.append(platform)
    return {"digest": digest, "mediaType": root.media_type, "platforms": platforms,
            "created": created, "missing": len(missing),
            "size": sum(sizes.values()), "count": len(sizes)}


def untagged(registry: Reader, name: str,
             limit: float = float("inf")) -> Optional[List[Digest]]:
    """The digests of the manifests that no tag points to, and that are neither a part of another
    manifest of the repository nor about one. None if more than `limit` bytes of manifests would
    have to be read. Raises NAME_UNKNOWN."""
    shown = {digest for _, digest in iter_tags(registry, name)}
    subjects: Dict[Digest, Optional[Digest]] = {}
    for manifest in registry.manifests(name):
        limit -= len(manifest.content)
        if limit < 0:
            return None
        subjects[manifest.digest] = None
        with contextlib.suppress(Invalid):  # stored by another program
            shown.update(child_digests(manifest))
            subjects[manifest.digest] = manifest.subject
    return sorted(digest for digest, subject in subjects.items()
                  if digest not in shown and subject not in subjects)

# -------------------------------------------------------------------------------------------------
# 6  Signatures
#
# Which images the keys of --signed-by have signed. Signatures are cosign's, of both forms: its
# "simple signing" under the tag sha256-HEX.sig, and its bundles among the referrers. The openssl
# command checks them. Keys come from files of the operator, never from what is checked.
# -------------------------------------------------------------------------------------------------

# What a bundle's envelope and its statement have to be: it may be about an SBOM instead.
STATEMENT = ("application/vnd.in-toto+json", "https://in-toto.io/Statement/v1",
             "https://sigstore.dev/cosign/sign/v1")
MAX_SIGNED = 1 << 20         # bytes of a signed text; it has a few hundred, a bundle some thousand
MAX_SIGNATURES = 100         # signatures of an image, and manifests about it, that are looked at

# The openssl command that checks a signature, by a word in openssl's description of the key.
CHECK_DIGEST = ("dgst", "-sha256", "-verify", "key", "-signature", "signature", "signed")
CHECKS = {"prime256v1": CHECK_DIGEST, "Modulus": CHECK_DIGEST, "ED25519": (
    "pkeyutl", "-verify", "-pubin", "-inkey", "key", "-rawin", "-sigfile", "signature",
    "-in", "signed")}


def openssl_reads(files: Dict[str, bytes], *arguments: str) -> Optional[str]:
    """What an openssl command prints that reads files with this content; None if it fails. Raises
    CommandError, OSError."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        return openssl(*arguments, folder=folder, check=False)


class PublicKey(NamedTuple):
    """A key in PEM, and the openssl command that checks its signatures."""

    pem: bytes
    check: Tuple[str, ...]


def parse_key(path: str, pem: bytes) -> PublicKey:
    """A public key of a file. Raises CommandError for one that can't be used."""
    text = openssl_reads({"key": pem}, "pkey", "-pubin", "-noout", "-text", "-in", "key") or ""
    checks = [check for word, check in CHECKS.items() if word in text]
    if not checks:
        raise CommandError("%s has a key that is neither ECDSA P-256, RSA nor Ed25519" % path)
    if "-rawin" in checks[0] and "-rawin" not in (openssl("pkeyutl", "-help", check=False) or ""):
        raise CommandError("%s has an Ed25519 key, which takes OpenSSL 3; here is an older one, "
                           "for ECDSA P-256 and RSA" % path)
    return PublicKey(pem, checks[0])


def read_keys(path: str) -> List[PublicKey]:
    """The public keys in a file. Raises CommandError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIGNED)
    except OSError as error:
        raise CommandError("can't read the keys in %s: %s" % (path, error.strerror))
    if b"PRIVATE KEY-----" in content:
        raise CommandError("%s has a private key: keep it secret, and name the file of the public "
                           "one (cosign.pub; openssl pkey -pubout makes it)" % path)
    keys = re.findall(b"-----BEGIN PUBLIC KEY-----[^-]+-----END PUBLIC KEY-----\n?", content)
    if not keys:
        raise CommandError("%s has no public key in PEM, as cosign.pub is one" % path)
    return [parse_key(path, key) for key in keys]


# What a signature says: the digests that it is about, the bytes that are signed, and the
# signature in base64.
Claim = Tuple[List[str], bytes, str]


def read_simple_signing(layer: Document, content: bytes) -> Claim:
    """The Claim in cosign's first form. Raises ValueError, LookupError, TypeError, as does the
    function below, for what is none."""
    critical = load_json(content, is_strict=True)["critical"]
    if critical["type"] != "cosign container image signature":
        raise ValueError("no signature of an image")
    return ([critical["image"]["docker-manifest-digest"]], content,
            layer["annotations"]["dev.cosignproject.cosign/signature"])


def read_bundle(layer: Document, content: bytes) -> Claim:
    """The Claim in the form of cosign 3: an in-toto statement, in an envelope of DSSE."""
    envelope = load_json(content, is_strict=True)["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"], validate=True)
    statement = load_json(payload, is_strict=True)
    if (envelope["payloadType"], statement["_type"], statement["predicateType"]) != STATEMENT:
        raise ValueError("no signature of an image")
    (signature,) = envelope["signatures"]
    head = "DSSEv1 %d %s %d " % (len(STATEMENT[0]), STATEMENT[0], len(payload))
    return (["sha256:" + subject["digest"]["sha256"] for subject in statement["subject"]],
            head.encode() + payload, signature["sig"])


READERS = {  # by the media type of the layer
    "application/vnd.dev.cosign.simplesigning.v1+json": read_simple_signing,
    "application/vnd.dev.sigstore.bundle.v0.3+json": read_bundle,
}


# What docker takes for the config of an image; of such an image it unpacks layers of any type.
RUNNABLE_CONFIGS = IMAGE_CONFIGS + VAGUE_TYPES + ("text/html",)
TEXT = re.compile(rb"\s*[{<]|SPDX")  # how signatures, attestations and SBOMs begin


def is_text(start: bytes) -> bool:
    """Whether the first 512 bytes of a layer are text, whatever its type says: neither compressed
    nor a tar's header, which is known by its checksum at 148, with signed or unsigned bytes."""
    field = start[148:156].strip(b"\0 ").split(b"\0")[0]
    total = sum(start) - sum(start[148:156]) + 8 * ord(" ")
    sums = {b"%o" % total, b"%o" % abs(total - 256 * sum(byte > 127 for byte in start))}
    return bool(TEXT.match(start)) and field.lstrip(b"0") not in sums


class Signed(Wrapper):
    """A registry of which only that is read which one of the keys has signed.

    A tag has to point to a manifest whose own digest is signed. What can't run is read under
    cosign's tags as it is. Blobs are not checked: they are no image without a manifest.

    In front of a cache, `is_checked` says in which repositories, and clients name by their digests
    what a manifest has led them to: there, a digest may also be that of something that can't run,
    or that has a signed index in the cache. Raises DENIED."""

    def __init__(self, inner: Any, keys: Iterable[PublicKey],
                 is_checked: Optional[Callable[[str], bool]] = None) -> None:
        super().__init__(inner)
        self.keys = keys
        self.is_checked = is_checked
        self.check = functools.lru_cache(MAX_TYPES)(self._check)  # an error is not kept

    def _read(self, name: str, layer: Document) -> Claim:
        """The Claim in the blob of a layer. Raises what says that it is none."""
        content, blob = bytearray(), parse_descriptor(layer)
        with self.inner.open_blob(name, blob.digest) as opened:
            copy_bytes(opened, min(blob.size, MAX_SIGNED), content.extend)
        return READERS[blob.media_type](layer, bytes(content))

    def _iter_claims(self, name: str, digest: Digest) -> Iterator[Dict[str, bytes]]:
        """Yield the files for openssl of what claims to be a signature of this manifest."""
        about: List[Digest] = []
        with contextlib.suppress(Unknown):  # there is none in cosign's first form
            about.append(self.inner.resolve(name, fallback_tag(digest) + ".sig"))
        about += self.inner.referrer_digests(name, digest)
        read = functools.partial(find_readable, self.inner, name)
        layers = (layer for manifest in filter(None, map(read, about[:MAX_SIGNATURES]))
                  for layer in manifest.document.get("layers") or ()
                  if layer.get("mediaType") in READERS)
        for layer in itertools.islice(layers, MAX_SIGNATURES):
            # What is no signature, or can't be read, counts for nothing.
            with contextlib.suppress(Unknown, OSError, ValueError, LookupError, TypeError):
                digests, signed, signature = self.inner.retry(self._read, name, layer)
                if digest in digests:
                    yield {"signed": signed,
                           "signature": base64.b64decode(signature, validate=True)}

    def is_signed(self, name: str, digest: Digest) -> bool:
        """Whether one of the keys has signed this digest."""
        return any(openssl_reads(dict(files, key=key.pem), *key.check) is not None
                   for files in self._iter_claims(name, digest) for key in self.keys)

    def _is_text(self, name: str, layer: Descriptor) -> bool:
        start, count, length = memoryview(bytearray(512)), 1, 0
        with contextlib.suppress(Unknown):  # what is not here can't run
            with self.inner.open_blob(name, layer.digest) as blob:
                while count and length < 512:  # whatever size the manifest says
                    count = blob.readinto(start[length:])
                    length += count
            return is_text(bytes(start[:length]))
        return True

    def _can_run(self, name: str, manifest: Manifest) -> bool:
        """Whether a client may take a manifest for an image. cosign, too, gives a signature the
        config of an image: then its layers tell."""
        config, *layers = manifest.blobs
        if any(LAYER_TYPES.match(blob.media_type) for blob in manifest.blobs):
            return True
        return config.media_type in RUNNABLE_CONFIGS and not all(
            self.inner.retry(self._is_text, name, layer) for layer in layers)

    def _iter_indexes(self, name: str, manifest: Manifest) -> Iterator[Digest]:
        """Yield the indexes in the cache that a manifest is a part of."""
        for index in self.inner.at_hand().manifests(name):
            with contextlib.suppress(Invalid):  # another program has stored it
                if manifest.digest in child_digests(index):
                    yield index.digest

    def _check(self, name: str, reference: Reference, digest: Digest) -> None:
        """Raises DENIED unless the manifest may be read that this reference points to."""
        if self.is_checked and not self.is_checked(name):
            return
        read = functools.partial(find_readable, self.inner, name)
        in_cache = self.is_checked and isinstance(reference, Digest)
        if in_cache or FALLBACK_TAG.fullmatch(reference):
            manifest = read(digest)
            if manifest and manifest.blobs and not self._can_run(name, manifest):
                return
        above = walk([digest], read, functools.partial(self._iter_indexes, name))
        digests = (manifest.digest for manifest in above) if in_cache else [digest]
        if not any(self.is_signed(name, other) for other in digests):
            raise RegistryError("DENIED", message="no key of --signed-by has signed %s" % digest)

    def resolve(self, name: str, tag: str) -> Digest:
        digest = self.inner.resolve(name, tag)
        self.check(name, tag, digest)
        return digest

    def manifest(self, name: str, digest: Digest) -> Manifest:
        manifest = self.inner.manifest(name, digest)
        self.check(name, digest, digest)
        return manifest

# -------------------------------------------------------------------------------------------------
# 7  Directory
#
# The store. Layout knows every path below ROOT: CNCF Distribution's file system layout, and our
# own folder beside it. Content is written before the link to it, and the link before the tag;
# deletions go the other way. So a crash leaves at worst content that nothing refers to. What
# another program left damaged counts as missing and is logged; the next push of it mends it.
# Garbage collection and verification are left to the room below, HTTP to the API.
# -------------------------------------------------------------------------------------------------

# Files that Layout.is_lasting() may say yes to.
LASTING = re.compile(
    r"(docker/registry/v2/blobs/\w{6}/\w\w/\w+/data)|docker/registry/v2/repositories/(.+)"
    r"/_(?:layers|manifests/revisions|manifests/tags/\w[\w.-]{0,127}/index)/\w{6}/\w+/link|"
    r"tinyreg/pinned/(.+)/_digests/\w{6}/\w+", re.ASCII)
REFERRER_LINE = re.compile("^(%s) (%s|-)$" % (DIGEST.pattern, DIGEST.pattern), re.MULTILINE)


def digest_folders(*path: str, shards: bool = False) -> Iterator[Tuple[Digest, str]]:
    """Yield (digest, folder) for each folder that has a digest's name below sha256 and sha512 of a
    folder. Between the two there may be `shards`, one for each first two digits. Raises OSError."""
    for algorithm in ALGORITHMS:
        top = os.path.join(*path, algorithm)
        folders = [os.path.join(top, shard) for shard in list_directory(top)] if shards else [top]
        for folder in folders:
            for encoded in list_directory(folder):
                digest = "%s:%s" % (algorithm, encoded)
                if DIGEST.fullmatch(digest):
                    yield Digest(digest), os.path.join(folder, encoded)


def hash_of_file(file: BinaryIO, algorithm: str,
                 progress: Callable[[int], Any] = do_nothing) -> Any:
    """The hash object after all bytes of an open file. `progress` is called with the size of each
    block that was read. Raises OSError, and what `progress` raises."""
    hasher = hashlib.new(algorithm)
    file.seek(0)
    for block in iter(functools.partial(file.read, COPY_BUFFER), b""):
        hasher.update(block)
        progress(len(block))
    return hasher


def raise_unless_gone(error: OSError) -> None:
    """For os.walk(), which would take a folder that can't be read for an empty one."""
    if not isinstance(error, FileNotFoundError):  # another process has deleted the folder
        raise error


class Quota(NamedTuple):
    """How many bytes an account may have: all repositories below a name that fits the glob."""

    glob: str
    limit: int

    def account(self, name: str) -> Optional[str]:
        """The account of a repository, None if it has none here."""
        account = "/".join(name.split("/")[:self.glob.count("/") + 1])
        return account if parse_glob(self.glob).fullmatch(account) else None


class Layout:
    """Where everything lies below ROOT: the paths and links of Distribution's tree, and our own
    folder beside it. The folder of a blob, a manifest or a tag has a file `link` in it, whose
    content is a digest. (A push makes a hundred of these paths, too many for os.path.join().)"""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.tree = os.path.join(self.root, "docker", "registry", "v2")
        self.own = os.path.join(self.root, "tinyreg")
        self.repositories = os.path.join(self.tree, "repositories")
        self.scratch = os.path.join(self.own, "scratch")
        self.uploads = os.path.join(self.own, "uploads")
        self.usage = os.path.join(self.own, "usage")
        self.shared = os.path.join(self.own, "shared")
        self.journal = os.path.join(self.own, "journal")
        self.collected = os.path.join(self.own, "gc")  # locked during a run, and written at its end

    # Distribution's tree

    def blob_path(self, digest: Digest) -> str:
        encoded = digest.encoded
        return "%s/blobs/%s/%s/%s/data" % (self.tree, digest.algorithm, encoded[:2], encoded)

    def repository_path(self, name: str, *parts: str) -> str:
        return "/".join((self.repositories, name) + parts)

    def layer_path(self, name: str, digest: Digest) -> str:
        """The folder whose link says that a repository has a blob."""
        return self.repository_path(name, "_layers", digest.algorithm, digest.encoded)

    def revision_path(self, name: str, digest: Digest) -> str:
        """The folder whose link says that a repository has a manifest."""
        return self.repository_path(name, "_manifests", "revisions", digest.algorithm,
                                    digest.encoded)

    def tag_path(self, name: str, tag: str) -> str:
        return self.repository_path(name, "_manifests", "tags", tag)

    def current_path(self, name: str, tag: str) -> str:
        """The folder whose link says what a tag points to now."""
        return self.tag_path(name, tag) + "/current"

    def former_path(self, name: str, tag: str) -> str:
        """The folder with a digest's folder for each manifest that a tag has pointed to."""
        return self.tag_path(name, tag) + "/index"

    def foreign_upload_path(self, name: str, session_id: str) -> str:
        """The bytes of an upload session that Distribution has begun, or an earlier tinyreg. Beside
        them are the time when it began, and what only Distribution can read."""
        return self.repository_path(name, "_uploads", session_id, "data")

    # Our own folder

    def upload_path(self, name: str, session_id: str) -> str:
        """The bytes of an upload session. Distribution has a folder and two files for one; to make
        and delete these takes longer than all else of a small blob."""
        return "%s/%s/_%s" % (self.uploads, name, session_id)

    def pins_path(self, name: str) -> str:
        """The folder with an empty file for each manifest that was pulled or loaded by digest."""
        return os.path.join(self.own, "pinned", name, "_digests")

    def pin_path(self, name: str, digest: Digest) -> str:
        return os.path.join(self.pins_path(name), digest.algorithm, digest.encoded)

    def referrers_path(self, name: str) -> str:
        """The file that remembers which manifest of a repository is about which other."""
        return os.path.join(self.own, "referrers", name, "_index")

    def is_lasting(self, path: str, content: bytes) -> bool:
        """Whether a file below ROOT may have this content, and never another: a blob, a link that
        says what is there, a pin. (What a tag points to now is no such link.)"""
        match = LASTING.fullmatch(path)
        if not match:
            return False
        blob, link_of, pin_of = match.groups()
        if blob:
            return any(self.blob_path(Digest.of(content, algorithm)).endswith(path)
                       for algorithm in ALGORITHMS)
        text = content.decode("latin-1")
        return bool(NAME.fullmatch(link_of or pin_of)
                    and (DIGEST.fullmatch(text) if link_of else not content))

    # What is there

    def iter_repositories(self, below: str = "") -> Iterator[str]:
        """The names of all folders that are repositories, also those without manifests: of a
        name and all below it, or of all. Raises OSError."""
        os.stat(self.repositories)  # a disk that is not mounted must not look like an empty store
        for folder, children, _ in os.walk(self.repository_path(below), onerror=raise_unless_gone,
                                           followlinks=True):
            if any(child.startswith("_") for child in children):
                yield os.path.relpath(folder, self.repositories)
            children[:] = [child for child in children if not child.startswith("_")]

    def iter_uploads(self, below: str = "", repositories: Optional[Iterable[str]] = None
                     ) -> Iterator[Tuple[str, str, str]]:
        """Yield (repository, session id, path of its bytes) for each upload session: of a name and
        all below it, or of all. `repositories` are the same, if the caller has listed them; they
        may have sessions that Distribution began. Raises OSError."""
        for folder, _, files in os.walk(os.path.join(self.uploads, below),
                                        onerror=raise_unless_gone):
            for file in files:
                if file.startswith("_"):  # NFS leaves others of what was deleted while it was open
                    name = os.path.relpath(folder, self.uploads)
                    yield name, file[1:], os.path.join(folder, file)
        for name in self.iter_repositories(below) if repositories is None else repositories:
            for session_id in list_directory(self.repository_path(name, "_uploads")):
                if SESSION_ID.fullmatch(session_id):
                    yield name, session_id, self.foreign_upload_path(name, session_id)

    def iter_blobs(self) -> Iterator[Tuple[Digest, str]]:
        """Yield (digest, folder) for each blob. Raises OSError."""
        return digest_folders(self.tree, "blobs", shards=True)

    def iter_layers(self, name: str) -> Iterator[Tuple[Digest, str]]:
        """Yield (digest, folder) for each link of a repository to a blob. Raises OSError."""
        return digest_folders(self.repository_path(name, "_layers"))

    def iter_revisions(self, name: str) -> Iterator[Tuple[Digest, str]]:
        """Yield (digest, folder) for each link of a repository to a manifest. Raises OSError."""
        return digest_folders(self.repository_path(name, "_manifests", "revisions"))

    def linked(self, name: str) -> Set[Digest]:
        """What a repository has links to: its blobs and manifests, each once. Raises OSError."""
        return {digest for digest, _ in itertools.chain(self.iter_layers(name),
                                                        self.iter_revisions(name))}

    def list_tags(self, name: str) -> List[str]:
        """The names of a repository's folders of tags, also of those without a link."""
        return list_directory(self.tag_path(name, ""))

    @staticmethod
    def link_in(folder: str) -> str:
        """The path of the link in a folder of a blob, a manifest or a tag."""
        return folder + "/link"

    def read_link(self, folder: str) -> Optional[Digest]:
        """The digest that a folder's link names; None if it is missing or damaged, which is
        logged. It may differ from the path's: where a blob was pushed by its sha512, Distribution
        links to the sha256 under which it stored it."""
        content = read_file(self.link_in(folder), 200)
        if content is None:
            return None
        try:
            return parse_digest(content.decode("ascii"))
        except (UnicodeDecodeError, DigestInvalid):
            logger.warning("damaged link, taken as missing: %s/link", folder)
            return None

    def manifest_content(self, digest: Digest) -> Optional[bytes]:
        """The bytes of a manifest; None if they are missing or are not its digest's. Raises
        OSError."""
        content = read_file(self.blob_path(digest), MAX_MANIFEST + 1)
        if content is not None and Digest.of(content, digest.algorithm) == digest:
            return content
        return None


class ReferrersIndex:
    """Which manifests of a repository have which subject.

    A manifest's subject never changes, so the index only grows. It is a file with a line
    `DIGEST SUBJECT` (or `DIGEST -`) for each manifest that was read for it, whoever stored it; a
    manifest without a line is read when the index is next used. So the file may lack something
    but is never wrong: it needs no fsync and no lock, and a line that a crash has cut off is
    written again.

    What was read is kept in memory as long as `version()`, the store's, returns the same."""

    def __init__(self, layout: Layout, version: Callable[[], Optional[bytes]]) -> None:
        self.layout = layout
        self.version = version
        # {repository name: (state, {subject: digests of its referrers})}
        self.cached: "collections.OrderedDict[str, Any]" = collections.OrderedDict()

    def _state(self, name: str) -> Any:
        """A value that differs after each manifest that is stored, by us or by another program.
        None where a change may not show: if the last one is only seconds old, or if nothing may
        be kept in memory."""
        folders = [look_at(self.layout.repository_path(name, "_manifests", "revisions", algorithm))
                   for algorithm in ALGORITHMS]
        is_settled = max(folder.mtime for folder in folders) < time.time() - SETTLING_TIME
        version = self.version()
        return (version, folders) if version and is_settled else None

    def _read_subject(self, digest: Digest) -> Optional[str]:
        """The subject of a manifest; `-` if it has none, None if it can't be read at present."""
        content = self.layout.manifest_content(digest)
        try:
            return None if content is None else Manifest(content, digest).subject or "-"
        except Invalid:
            return "-"

    def _append(self, path: str, subjects: Dict[Digest, str]) -> None:
        """Write lines for these manifests to the file."""
        lines = "".join("\n%s %s\n" % item for item in subjects.items())
        with contextlib.suppress(OSError):  # on a full disk they are read again next time
            make_directories(os.path.dirname(path))
            with open(path, "ab", opener=open_owned) as file:
                file.write(lines.encode("ascii"))

    def by_subject(self, name: str) -> Dict[str, Set[str]]:
        """{subject: digests of its referrers} of a repository. Raises OSError."""
        state = self._state(name)
        cached_state, referrers = self.cached.get(name, (None, {}))
        if state and cached_state == state:
            return referrers
        path = self.layout.referrers_path(name)
        content = read_file(path, -1) or b""
        subjects = dict(REFERRER_LINE.findall(content.decode("ascii", "replace")))
        # Only links that are new are read: a repository may have a hundred thousand manifests.
        listed = list(self.layout.iter_revisions(name))
        fresh = {digest: self._read_subject(digest) for digest, folder in listed
                 if digest not in subjects and self.layout.read_link(folder)}
        readable = {digest: subject for digest, subject in fresh.items() if subject}
        if readable:
            self._append(path, readable)
            subjects.update(readable)
        referrers = {}
        for digest, subject in subjects.items():
            if subject != "-":
                referrers.setdefault(subject, set()).add(digest)
        if state and all(digest in subjects for digest, _ in listed):
            self.cached[name] = state, referrers
            while len(self.cached) > INDEXED_REPOSITORIES:
                self.cached.popitem(last=False)
        return referrers


class Directory(Registry):
    """A store in a directory. Several processes may have it open at once. Raises OSError.

    `sparse` stores image manifests whose blobs are missing. An upload is refused if it would
    leave less than `min_free` bytes on the disk, or is larger than `max_blob` bytes, if that is
    not 0; and what would be too much for a `quota`: the last one that an account fits counts.
    Without `create`, a root that is no store yet is an error.

    `shared` says that other hosts have the store open, too, as does the file ROOT/tinyreg/shared.
    They see of each other what the file system promises: locks between hosts; a rename at once;
    and whoever opens a file reads what another host wrote before it closed it. Then nothing is kept
    in memory. An upload may go on at another host; that one reads it again at its end, since its
    `key` is another.

    Without `renew` nothing that is read counts as told to a client: the mtimes of links stay, and
    gc's grace period goes on."""

    def __init__(self, root: str, sparse: bool = False, create: bool = True, min_free: int = 0,
                 max_blob: int = 0, shared: bool = False, renew: bool = True,
                 quota: Iterable[Quota] = ()) -> None:
        self.layout = Layout(root)
        self.root = self.layout.root
        self.sparse = sparse
        self.min_free = min_free
        self.max_blob = max_blob
        self.quotas = quota
        self.renew = renew
        if create:
            for path in (os.path.join(self.layout.tree, "blobs"), self.layout.repositories):
                make_directories(path)
        elif not os.path.isdir(self.layout.tree):
            os.stat(self.layout.tree)  # raises the true error if we only may not look
            raise FileNotFoundError(errno.ENOENT, "no registry is stored here", self.root)
        try:
            make_directories(self.layout.scratch)
        except OSError:  # a volume of Distribution's that is only read needs no such folder
            if create:
                raise
        if create and not os.path.exists(self.layout.collected):
            # Made now, because a full disk, which needs gc, takes no new file. Where it is full
            # by now, what is here can be pulled all the same.
            with contextlib.suppress(OSError):
                open(self.layout.collected, "ab", opener=open_owned).close()
                os.utime(self.layout.collected, (0, 0))  # there was no run yet
        self.files = Files(self.layout.scratch)
        self.shared = shared or os.path.exists(self.layout.shared)
        self.lock = SharedLock(os.path.join(self.layout.own, "lock"), marked=not self.shared)
        self.journal = Journal(self.files, self.layout.journal, self.root, self.lock,
                               self.layout.is_lasting)
        self.recover()
        self.index = ReferrersIndex(self.layout, self.version)
        # {(session id, offset): the hash of all bytes before the offset}
        self.hashers: "collections.OrderedDict[Any, Any]" = collections.OrderedDict()
        self.key = os.urandom(32)  # signs the states of upload sessions; workers inherit it

    def recover(self) -> None:
        """Bring in what processes that were killed have left in journals."""
        try:
            os.stat(self.layout.repositories)  # not where a disk is not mounted
            self.journal.recover()
        except PermissionError:
            pass  # whose store it is, who may write, does it
        except OSError as error:
            logger.warning("images that were pushed just before a power cut may be missing until "
                           "the store is served by somebody who may write to it: %s", error)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock alone, to delete. All that is durable is so in its place."""
        with self.lock.alone():
            os.stat(self.layout.repositories)  # nothing is settled where a disk is not mounted
            self.journal.settle_all()
            yield

    # Small files

    def _is_for_journal(self, size: int) -> bool:
        """Whether a file of this size goes through the journal, which is one host's."""
        return size <= SMALL_FILE and not self.shared

    def _keep(self, *files: SmallFile) -> None:
        """Put files in place, durably and in this order, but those first that are not for the
        journal. They are of the kind that never changes. The caller shares the lock."""
        small = []
        for file in files:
            if self._is_for_journal(len(file.content)):
                small.append(file)
            else:
                self.files.write(file.path, file.content)
        if small:
            self.journal.write(small)

    def link(self, folder: str, digest: Digest) -> SmallFile:
        """The link in a folder."""
        return SmallFile(self.layout.link_in(folder), digest.encode("ascii"))

    def _touch_link_if_old(self, folder: str) -> bool:
        """Whether a link is there. The caller then tells a client of what the link names.

        The link's mtime says when that last happened: gc leaves the link, and the blob behind it,
        for its grace period after that."""
        link = self.layout.link_in(folder)
        try:
            if time.time() - os.stat(link).st_mtime > TOUCH_AGAIN_AFTER and self.renew:
                os.utime(link)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # we may only read this store
        return True

    def _touch_links(self, name: str, digest: Digest) -> bool:
        """Keep gc away from a blob and a manifest of a repository; False if it has neither. The
        caller shares the lock."""
        is_there = False
        for folder in (self.layout.layer_path(name, digest),
                       self.layout.revision_path(name, digest)):
            with contextlib.suppress(FileNotFoundError):  # it is only the other one, or neither
                os.utime(self.layout.link_in(folder))
                is_there = True
        return is_there

    # Reading

    def version(self) -> Optional[bytes]:
        return self.lock.mark.value() if self.lock.mark else None

    def check_ready(self, to_write: bool = True) -> None:
        os.stat(self.layout.tree)
        if to_write:
            self.files.probe()
            if self.free_space() < MIN_FREE_SPACE:
                raise RegistryError("UNAVAILABLE",
                                    message="less than 64 MiB are free on the store's disk")

    def has_repository(self, name: str) -> bool:
        return any(os.path.isdir(self.layout.repository_path(name, kind))
                   for kind in ("_manifests", "_layers"))

    def _unknown(self, name: str, code: str, detail: str) -> RegistryError:
        """The error for what is not there: NAME_UNKNOWN if the whole repository is not."""
        if self.has_repository(name):
            return RegistryError(code, detail)
        return RegistryError("NAME_UNKNOWN", name)

    def repositories(self, last: str = "") -> Iterator[str]:
        return self._repositories_below(self.layout.repositories, "", last)

    def _repositories_below(self, path: str, prefix: str, last: str) -> Iterator[str]:
        """Yield the repositories below a folder, whose names begin with `prefix`.

        `a` sorts before `a-b`, and that before `a/b`. So each folder stands in the order twice:
        under its name, as a repository; and under its name with a slash, as what it contains."""
        names = [prefix + entry for entry in list_directory(path) if entry[0] not in "._"]
        for step in sorted(names + [name + "/" for name in names]):
            folder = os.path.join(path, step[len(prefix):])
            if step.endswith("/"):
                if step > last or last.startswith(step):
                    yield from self._repositories_below(folder, step, last)
            elif step > last and NAME.fullmatch(step):
                if os.path.isdir(os.path.join(folder, "_manifests")):
                    yield step

    def tags(self, name: str, last: str = "") -> Iterator[str]:
        if not os.path.isdir(self.layout.repository_path(name, "_manifests")):
            raise RegistryError("NAME_UNKNOWN", name)
        return (tag for tag in self.layout.list_tags(name)
                if tag > last and TAG.fullmatch(tag) and self._is_tag(name, tag))

    def _is_tag(self, name: str, tag: str) -> bool:
        """Whether a tag's link is not empty. To look is less work than to read it, ten thousand
        times."""
        return look_at(self.layout.link_in(self.layout.current_path(name, tag))).size > 0

    def resolve(self, name: str, tag: str) -> Digest:
        digest = self.layout.read_link(self.layout.current_path(name, tag))
        if digest is None:
            raise self._unknown(name, "MANIFEST_UNKNOWN", tag)
        return digest

    def manifest(self, name: str, digest: Digest) -> Manifest:
        revision = self.layout.revision_path(name, digest)
        if self.layout.read_link(revision) is None or not self._touch_link_if_old(revision):
            raise self._unknown(name, "MANIFEST_UNKNOWN", digest)
        content = self.layout.manifest_content(digest)
        if content is None:
            logger.warning("damaged manifest, taken as missing: %s in %s", digest, name)
            raise RegistryError("MANIFEST_UNKNOWN", digest)
        return Manifest(content, digest)

    def revisions(self, name: str) -> Iterator[Digest]:
        """Yield the digests of the manifests to which a repository has a link, in order."""
        return (digest for digest, folder in self.layout.iter_revisions(name)
                if self.layout.read_link(folder))

    def manifests(self, name: str) -> Iterator[Manifest]:
        for digest in self.revisions(name):
            content = self.layout.manifest_content(digest)
            if content is not None:
                yield Manifest(content, digest)

    def _find_data(self, digest: Digest, offset: int = 0) -> Optional[Blob]:
        """The open bytes of a blob; None if they are missing, or if the file is empty and should
        not be, which is logged."""
        path = self.layout.blob_path(digest)
        try:
            file = open(path, "rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            return None
        size = os.fstat(file.fileno()).st_size
        if size == 0 and digest != Digest.of(b"", digest.algorithm):
            logger.warning("damaged blob (empty), taken as missing: %s", path)
            file.close()
            return None
        return Blob(file, offset, max(size - offset, 0))

    def open_blob(self, name: str, digest: Digest, offset: int = 0) -> Blob:
        layer = self.layout.layer_path(name, digest)
        target = self.layout.read_link(layer)
        blob = None
        if target and self._touch_link_if_old(layer):
            blob = self._find_data(target, offset)
        if blob is None:
            raise self._unknown(name, "BLOB_UNKNOWN", digest)
        return blob

    def digests(self, name: Optional[str] = None) -> Iterator[Digest]:
        if name is None:
            for digest, folder in self.layout.iter_blobs():
                if os.path.isfile(os.path.join(folder, "data")):
                    yield digest
            return
        linked = {digest for digest, folder in self.layout.iter_layers(name)
                  if self.layout.read_link(folder)}
        for digest in sorted(linked.union(self.revisions(name))):
            # Distribution's garbage collection leaves links to blobs that it has deleted.
            if os.path.isfile(self.layout.blob_path(digest)):
                yield digest

    def referrers(self, name: str, subject: Digest, last: str = "") -> Iterator[Manifest]:
        indexed = self.index.by_subject(name).get(subject, set())
        for digest in sorted(indexed | self._tagged_referrers(name, subject)):
            if digest > last:
                try:
                    manifest = self.manifest(name, Digest(digest))
                    its_subject = manifest.subject
                except (Unknown, Invalid):  # deleted since it was indexed, or only ever listed
                    continue
                if its_subject in (None, subject):
                    yield manifest

    def _tagged_referrers(self, name: str, subject: Digest) -> Set[str]:
        """The digests that the index lists under whose tag clients keep the referrers in a
        registry that does not (distribution-spec, "Referrers Tag Schema"). Only there does a
        manifest without a subject count."""
        try:
            index = self.manifest(name, self.resolve(name, fallback_tag(subject)))
            return {entry.digest for entry in index.manifests}
        except (Unknown, Invalid):  # there is none, or it is damaged
            return set()

    def pushed(self, name: str, reference: Reference) -> float:
        if isinstance(reference, Digest):
            return look_at(self.layout.pin_path(name, reference)).mtime
        return look_at(self.layout.link_in(self.layout.current_path(name, reference))).mtime

    def history(self, name: str, tag: str) -> List[Tuple[Digest, float]]:
        present = self.resolve(name, tag)
        former = {digest: look_at(self.layout.link_in(folder)).mtime for digest, folder
                  in digest_folders(self.layout.former_path(name, tag)) if digest != present}
        return [(present, self.pushed(name, tag))] + sorted(
            former.items(), key=lambda entry: entry[1], reverse=True)

    def pinned(self, name: str) -> Iterator[Digest]:
        """Yield the digests that gc keeps as if they had a tag, in order."""
        return (digest for digest, _ in digest_folders(self.layout.pins_path(name)))

    def needs(self, digest: Digest) -> Tuple[List[Digest], List[Digest]]:
        """The digests of a manifest's blobs, and of its children, which an index may lack; none if
        it is no manifest."""
        try:
            manifest = Manifest(self.layout.manifest_content(digest) or b"", digest)
            return ([blob.digest for blob in manifest.blobs if not blob.foreign],
                    [child.digest for child in manifest.manifests])
        except Invalid:
            return [], []

    # Space

    def usage(self, longest: float = float("inf")) -> Dict[str, Any]:
        """The last measurement, from a file that all processes share."""
        path = self.layout.usage
        # The file may be missing, damaged, or another version's.
        with contextlib.suppress(ValueError, KeyError, OSError):
            usage = load_json(read_file(path, -1) or b"")
            age = time.time() - os.stat(path).st_mtime
            if usage["took"] > longest or 0 <= age < max(USAGE_LIFE, 50 * usage["took"]):
                return usage
            os.utime(path)  # the other processes use the old one while this one measures anew
        usage = self.measure()
        with contextlib.suppress(OSError):  # a disk that is full or read-only: measured each time
            self.files.write(path, to_json(usage))
        return usage

    def measure(self) -> Dict[str, Any]:
        """What takes how much space, as a dict for JSON. Reads every folder, so it takes a while.

        time, took: when it began, and for how many seconds it measured;
        blobs, bytes: the number and size of all blobs and manifests;
        unlinked: the bytes of those that no repository has;
        uploads: the number of upload sessions;
        free, total: bytes of the disk;
        repositories: {name: [bytes that it alone has, bytes that it shares with others]};
        shared: {digest: the first five repositories} of blobs that several have."""
        began, start = time.time(), time.monotonic()
        sizes = {}
        owners: Dict[Digest, List[str]] = {}
        for digest, folder in self.layout.iter_blobs():
            with contextlib.suppress(OSError):  # deleted meanwhile, or its disk fails
                sizes[digest] = os.stat(os.path.join(folder, "data")).st_size
        repositories = {name: [0, 0] for name in self.repositories()}
        for name in repositories:
            for digest in self.layout.linked(name):
                owners.setdefault(digest, []).append(name)
        shared = {digest: names for digest, names in owners.items() if len(names) > 1}
        for digest, names in owners.items():
            for name in names:
                repositories[name][digest in shared] += sizes.get(digest, 0)
        uploads = sum(1 for _ in self.layout.iter_uploads(repositories=repositories))
        disk = os.statvfs(self.root)
        return {"time": began, "took": time.monotonic() - start,
                "blobs": len(sizes), "bytes": sum(sizes.values()),
                "unlinked": sum(sizes[digest] for digest in sizes.keys() - owners),
                "uploads": uploads, "repositories": repositories,
                "free": self.free_space(), "total": disk.f_blocks * disk.f_frsize,
                "shared": {digest: names[:6] for digest, names in shared.items()}}

    def free_space(self) -> int:
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def check_room(self, size: int = 0) -> None:
        """Raises UNAVAILABLE (507) if less than `min_free` bytes are free on the disk, and
        SIZE_INVALID (413) if a blob of this size is too large."""
        if self.min_free and self.free_space() < self.min_free:
            raise RegistryError(
                "UNAVAILABLE", status=507, message="the store is full: the registry's disk has "
                "less than %d bytes left, which it keeps free (--min-free)" % self.min_free)
        if self.max_blob and size > self.max_blob:
            raise RegistryError(
                "SIZE_INVALID", status=413, message="this registry takes blobs of up to %d bytes "
                "(--max-blob)" % self.max_blob)

    # Quotas

    def _quota_limits(self, name: str) -> List[Tuple[str, int]]:
        """(account, limit) of each account that a repository counts for, always in one order."""
        limits = {quota.account(name): quota.limit for quota in self.quotas}
        return sorted((account, limit) for account, limit in limits.items() if account)

    def check_quota(self, name: str, size: int, digest: Optional[Digest] = None) -> float:
        """How many bytes more a repository may have. Raises DENIED if `size` is more, unless its
        account has this digest already. (Not with 507: docker would try for a minute.)

        An account has the blobs and manifests to which its repositories have links, each once. They
        are counted anew each time, so that all processes and deletions count. Uploads do not, until
        they are blobs, since one that was cut waits for a day; but all of them together get as much
        room as the account. So without a digest, for an upload, the answer is good for some MiB."""
        room = float("inf")
        for account, limit in self._quota_limits(name):
            repositories = list(self.layout.iter_repositories(account))
            linked: Set[Digest] = set()
            for repository in repositories:
                linked |= self.layout.linked(repository)
            uploads = self.layout.iter_uploads(account, repositories)
            waiting = sum(look_at(path).size for _, _, path in uploads)
            used = sum(look_at(self.layout.blob_path(other)).size for other in linked)
            over = "over the quota: %s has %s of %s (--quota), and " % (
                account, in_units(used), in_units(limit))
            if used + size > limit and digest not in linked:
                raise RegistryError("DENIED", message=over + "this does not fit into the rest; at "
                                    "the registry, tinyreg.py rm and then gc --untagged make room")
            if used + waiting > 2 * limit and not digest:
                raise RegistryError("DENIED", message=over + "%s of uploads that have not ended; "
                                    "they are forgotten a day after their last byte"
                                    % in_units(waiting))
            room = min(room, limit - used, size + UPLOAD_STEP)
        return room

    @contextlib.contextmanager
    def _within_quota(self, name: str, size: int, digest: Digest) -> Iterator[None]:
        """Link content that fits into the quota, and let nobody else link to the same account
        meanwhile. The caller does not have the store's lock yet. Raises DENIED."""
        with contextlib.ExitStack() as locks:
            for account, _ in self._quota_limits(name):
                # The colon, because a repository may have the same name, and be locked by now.
                locks.enter_context(self.lock_repository(account + ":"))
            self.check_quota(name, size, digest)
            yield

    # Writing blobs

    def start_upload(self, name: str, algorithm: str = "sha256") -> "DirectoryUpload":
        session = DirectoryUpload(self, name, str(uuid.uuid4()))
        session.begin(algorithm)
        return session

    def find_upload(self, name: str, session_id: str) -> "DirectoryUpload":
        session = DirectoryUpload(self, name, session_id)
        if not session.resume():
            path = self.layout.foreign_upload_path(name, session_id)
            session = DirectoryUpload(self, name, session_id, path)
            if not session.resume():
                raise session.unknown()
        return session

    def has_upload(self, name: str, session_id: str) -> bool:
        return DirectoryUpload(self, name, session_id).resume()

    def keep_hasher(self, session: "DirectoryUpload", hasher: Any) -> None:
        """Keep the hash of an upload's bytes so far, for this process to go on from.

        That only saves time. The file is the truth, and an upload without a hash is read again
        when it is committed."""
        self.hashers[session.id, session.offset] = hasher
        while len(self.hashers) > HASHED_SESSIONS:
            self.hashers.popitem(last=False)

    def session_of_blob(self, name: str, digest: Digest) -> "DirectoryUpload":
        """The upload session by which put_blob() stores a blob; every process takes this one. It
        may not have begun.

        Its id is none that a client can send. Who wrote to it could let it begin again with other
        bytes, and prove them with the state of those before."""
        session_id = uuid.uuid5(uuid.NAMESPACE_URL, name + "@" + digest)
        return DirectoryUpload(self, name, "download-%s" % session_id)

    def put_blob(self, name: str, digest: Digest, open_from: Callable[[int], Blob]) -> None:
        session = self.session_of_blob(name, digest)
        with alone(os.path.join(self.layout.scratch, session.id)):
            while not self.mount(name, digest):  # another process has just stored it
                if not session.resume():
                    session.begin(digest.algorithm)
                is_resumed = session.offset > 0
                try:
                    with open_from(session.offset) as blob:
                        session.append(blob, session.offset)
                except BaseException:  # an interrupted command, too
                    if not session.offset:
                        session.cancel()  # there is nothing to go on from
                    raise
                try:
                    return session.commit(digest)
                except DigestInvalid:
                    # The bytes of an earlier attempt were never synced, and a power cut may have
                    # spoilt them: begin anew.
                    if not is_resumed:
                        raise

    def present_bytes(self, name: str, blob: Descriptor) -> int:
        session = self.session_of_blob(name, blob.digest)
        return look_at(self.layout.blob_path(blob.digest)).size or look_at(session.path).size

    def publish_blob(self, name: str, file: BinaryIO, size: int, digest: Digest) -> None:
        """Bring an open file of this size, whose content is checked, to its place among the blobs,
        and link the repository to it.

        If the blob is there it is replaced: that costs nothing, and mends a damaged one. The
        folders of the link come first: on a full disk it is better that they fail than that a
        blob is left to which nothing refers."""
        path = self.layout.blob_path(digest)
        link = self.link(self.layout.layer_path(name, digest), digest)
        is_small = self._is_for_journal(size)
        if not is_small:
            sync(file.fileno())
        with self._within_quota(name, size, digest), self.lock.shared():
            os.utime(file.name)  # gc should see it as new, though its last byte may be old
            if self.shared:
                # Links will be below this folder, so it has to be durable, whichever host has made
                # it. A journal does without.
                make_directories(self.layout.repository_path(name))
            if is_small:
                file.seek(0)
                return self._keep(SmallFile(path, file.read(size), file.name), link)
            make_directories(os.path.dirname(link.path), durable=self.shared)
            self.files.publish(file.name, path)
            self._keep(link)

    def mount(self, name: str, digest: Digest, source: Optional[str] = None) -> bool:
        target: Optional[Digest] = digest
        if source:
            target = self.layout.read_link(self.layout.layer_path(source, digest))
        if target is None:
            return False
        size = look_at(self.layout.blob_path(target)).size
        with self._within_quota(name, size, digest), self.lock.shared():
            blob = self._find_data(target)
            if blob is None:
                return False
            blob.close()
            os.utime(self.layout.blob_path(target))
            self._keep(self.link(self.layout.layer_path(name, digest), target))
        return True

    # Writing manifests

    def lock_repository(self, name: str) -> ContextManager[None]:
        """Lock a repository between processes. Wrappers do; the store itself does not."""
        return alone(os.path.join(self.layout.scratch,
                                  str(uuid.uuid5(uuid.NAMESPACE_URL, name))))

    def put_manifest(self, name: str, manifest: Manifest, tags: Iterable[str] = (),
                     check_wanted: Callable[[], None] = do_nothing, sparse: bool = False) -> None:
        sizes: Dict[Digest, Set[int]] = {}  # of each needed blob, as descriptors say
        for blob in manifest.blobs:
            if not (blob.foreign or sparse or self.sparse):
                sizes.setdefault(blob.digest, set()).add(blob.size)
        missing = {digest for digest in sizes if not self._check_blob_or_quarantine(
            name, digest, sizes[digest], check_wanted)}
        mentioned = {entry.digest for entry in manifest.blobs + manifest.manifests}
        if manifest.subject:
            mentioned.add(manifest.subject)
        size = len(manifest.content)
        tags = list(tags)
        with self._within_quota(name, size, manifest.digest), self.lock.shared():
            # gc may have deleted some meanwhile. It leaves those whose links are touched here.
            gone = {digest for digest in mentioned if not self._touch_links(name, digest)}
            missing |= gone.intersection(sizes)
            if missing:
                raise RegistryError("MANIFEST_BLOB_UNKNOWN", *sorted(missing))
            self._keep(SmallFile(self.layout.blob_path(manifest.digest), manifest.content),
                       self.link(self.layout.revision_path(name, manifest.digest), manifest.digest),
                       *[self._trace_of_tag(name, tag, manifest.digest) for tag in tags])
            # What the folders have is durable, or in the journal; their names may not be.
            folder = self.layout.repository_path(name)
            while tags and folder != self.layout.repositories:
                make_directories(folder)
                folder = os.path.dirname(folder)
            for tag in tags:
                if not isinstance(tag, Digest):
                    current = self.link(self.layout.current_path(name, tag), manifest.digest)
                    self.files.write(current.path, current.content)

    def _trace_of_tag(self, name: str, tag: str, digest: Digest) -> SmallFile:
        """What stays if a tag moves on: the link to a manifest to which it has pointed; the
        manifest's pin, if the tag is a digest."""
        if isinstance(tag, Digest):
            return SmallFile(self.layout.pin_path(name, tag), b"")
        return self.link(os.path.join(self.layout.former_path(name, tag), digest.algorithm,
                                       digest.encoded), digest)

    def _check_blob_or_quarantine(self, name: str, digest: Digest, sizes: Set[int],
                                  check_wanted: Callable[[], None]) -> bool:
        """Whether a repository has a blob to which a manifest's descriptors give these sizes.

        If its size is another one, that is either a mistake of whoever made the manifest, who may
        keep it, or a sign of damage. Reading the blob tells which; a damaged one is put in
        quarantine."""
        try:
            with self.open_blob(name, digest) as blob:
                if sizes == {blob.length}:
                    return True
                assert blob.file  # as of every blob here
                hasher = hash_of_file(blob.file, digest.algorithm, lambda size: check_wanted())
                if hasher.hexdigest() == digest.encoded:
                    return True
                path = blob.file.name
                logger.warning("damaged blob, put aside; push it again: %s", path)
                with self.alone():
                    if is_at(blob.file, path):  # else a whole one has been pushed meanwhile
                        self.quarantine(path)
        except Unknown:  # as a blob; a manifest may take this place
            return self.layout.read_link(self.layout.revision_path(name, digest)) is not None
        return False

    def quarantine(self, path: str) -> str:
        """Move a damaged file to ROOT/tinyreg/damaged, below the path that it had; returns where
        it is now. Raises OSError. The caller holds the lock alone.

        Clients do not push a blob that is there, so in its place it would never be mended."""
        aside = os.path.join(self.layout.own, "damaged", os.path.relpath(path, self.root))
        while os.path.exists(aside):
            aside += "~"
        make_directories(os.path.dirname(aside))
        os.rename(path, aside)
        sync_path(os.path.dirname(aside))
        sync_path(os.path.dirname(path))
        return aside

    # Deleting

    def delete_tag(self, name: str, tag: str) -> None:
        with self.alone():
            self.resolve(name, tag)
            self.files.remove(self.layout.tag_path(name, tag))

    def delete_manifest(self, name: str, digest: Digest) -> None:
        revision = self.layout.revision_path(name, digest)
        with self.alone():
            if self.layout.read_link(revision) is None:
                raise self._unknown(name, "MANIFEST_UNKNOWN", digest)
            for tag in list(self.tags(name)):
                if self.layout.read_link(self.layout.current_path(name, tag)) == digest:
                    self.files.remove(self.layout.tag_path(name, tag))
            with contextlib.suppress(FileNotFoundError):  # it was not pinned
                self.files.remove(self.layout.pin_path(name, digest))
            self.files.remove(revision)

    def delete_blob(self, name: str, digest: Digest) -> None:
        layer = self.layout.layer_path(name, digest)
        with self.alone():
            if self.layout.read_link(layer) is None:
                raise self._unknown(name, "BLOB_UNKNOWN", digest)
            self.files.remove(layer)


class DirectoryUpload(UploadSession):
    """An upload session: a file whose size is the offset.

    Two requests may write to one session at once: a client has lost its connection and comes
    back, and the server has not noticed yet. So each block is written under a lock on the file,
    and only if the file still ends where the writer believes and is still the session's. The
    request that came last goes on, the other one fails. No lock is held while a client sends.

    `state` has the size and this server's signature of the id, the size and the digest of the
    bytes so far. The client carries it to the process that commits, which then need not read the
    file again."""

    def __init__(self, store: Directory, name: str, session_id: str, path: str = "") -> None:
        self.store = store
        self.name = name
        self.id = session_id
        self.path = path or store.layout.upload_path(name, session_id)
        self.room = 0.0  # so many bytes its quota allows

    def _make_file(self) -> None:
        with descriptor_of(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL):
            pass

    def begin(self, algorithm: str) -> None:
        """Make the session's file, which need not be durable. Raises UNAVAILABLE, OSError."""
        self.offset, self.state = 0, ""
        self.store.check_room()
        self.store.check_quota(self.name, 1)
        try:
            self._make_file()
        except FileNotFoundError:  # it is the repository's first
            with self.store.lock.shared(changes=False):  # gc deletes empty folders
                make_directories(os.path.dirname(self.path), durable=False)
                self._make_file()
        self.store.keep_hasher(self, hashlib.new(algorithm))

    def resume(self) -> bool:
        """Learn the offset from the file; False if there is no such session. Raises OSError."""
        try:
            self.offset = os.stat(self.path).st_size
        except FileNotFoundError:
            return False
        return True

    def unknown(self) -> RegistryError:
        return RegistryError("BLOB_UPLOAD_UNKNOWN", self.id)

    def _misplaced(self) -> RegistryError:
        return RegistryError("RANGE_INVALID", {"offset": self.offset},
                             message="the chunk must begin at the offset")

    def _sign(self, size: int, algorithm: str, encoded: str) -> str:
        # A new server has a new key: if the host crashed, the file may have lost bytes since.
        text = "%s %d %s:%s" % (self.id, size, algorithm, encoded)
        return "%d-%s" % (size, hmac.new(self.store.key, text.encode(), "sha256").hexdigest())

    def _open(self) -> BinaryIO:
        """Open the session's file. Raises BLOB_UPLOAD_UNKNOWN."""
        try:
            return open(self.path, "r+b", buffering=0)
        except FileNotFoundError:
            raise self.unknown()

    def _check_size(self, size: int) -> None:
        """Raises UNAVAILABLE if the session's file is shorter than the client's state says: a
        network's file system may show what was a second ago."""
        if size < int(self.state.partition("-")[0] or 0):
            raise RegistryError("UNAVAILABLE", headers=[("Retry-After", "1")], message="the "
                                "registry's network disk does not show all of this upload yet")

    @contextlib.contextmanager
    def _locked(self, file: BinaryIO) -> Iterator[os.stat_result]:
        """Hold the lock on the session's open file; yields the file's status. Raises UNAVAILABLE;
        BLOB_UPLOAD_UNKNOWN if the file has become a blob, or is gone."""
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            status = os.fstat(file.fileno())
            if look_at(self.path, opened=self.store.shared).inode != status.st_ino:
                raise self.unknown()
            self._check_size(status.st_size)
            yield status
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def append(self, body: Any, start: Optional[int] = None) -> None:
        if getattr(body, "is_empty", False) and start is None:  # docker ends an upload so
            self._check_size(self.offset)
            self.store.check_quota(self.name, self.offset)
            return
        with self._open() as file:
            self.offset = file.seek(0, os.SEEK_END)
            self._check_size(self.offset)
            if start not in (None, self.offset):
                raise self._misplaced()
            # Of a request with a length it is known before its first byte is read.
            self.room = self.store.check_quota(self.name, self.offset + getattr(body, "left", 0))
            # Another process may have begun the upload; then sha256 is a good guess.
            unused = None if self.offset else hashlib.sha256()
            hasher = self.store.hashers.pop((self.id, self.offset), unused)
            # One byte more than a body says that it has, so that one that has more shows.
            size = min((getattr(body, "left", 0) or MAX_UPLOAD_READ) + 1, MAX_UPLOAD_READ)
            buffer, more = memoryview(bytearray(size)), True
            while more:
                filled = 0
                try:
                    while more and filled < COPY_BUFFER:
                        count = body.readinto(buffer[filled:])
                        more, filled = count > 0, filled + count
                finally:  # a client that has left may come back: what it sent before is kept
                    self._write(file, buffer[:filled])
                if hasher:
                    hasher.update(buffer[:filled])
            # An earlier upload may have left one: put_blob() uses the same id again.
            self.store.hashers.pop((self.id, self.offset), None)
            if hasher:
                self.state = self._sign(self.offset, hasher.name, hasher.hexdigest())
                self.store.keep_hasher(self, hasher)

    def _write(self, file: BinaryIO, block: memoryview) -> None:
        with self._locked(file) as status:
            if status.st_size != self.offset:
                self.offset = status.st_size
                raise self._misplaced()
            try:
                self.store.check_room(self.offset + len(block))
                if self.offset + len(block) > self.room:
                    self.room = self.store.check_quota(self.name, self.offset + len(block))
                while block:
                    count = file.write(block)
                    self.offset += count
                    block = block[count:]
            except (RegistryError, OSError) as error:
                # A full disk needs the space more than the client needs half a blob.
                full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                if isinstance(error, RegistryError) or error.errno in full:
                    self._forget()
                raise

    def commit(self, digest: Digest) -> None:
        """Raises DIGEST_INVALID. The session ends in any case: wrong bytes are of no use; and
        after a failed fsync the kernel may have dropped bytes, and a second fsync would not say
        so."""
        with self._open() as file, self._locked(file) as status:
            try:
                self._check_digest(file, status.st_size, digest)
                self.store.publish_blob(self.name, file, status.st_size, digest)
            finally:
                self._forget()

    def _check_digest(self, file: BinaryIO, size: int, digest: Digest) -> None:
        hasher = self.store.hashers.pop((self.id, size), None)
        signed = self._sign(size, digest.algorithm, digest.encoded)
        if hmac.compare_digest(self.state.encode(), signed.encode()):
            return
        if hasher is None or hasher.name != digest.algorithm:
            hasher = hash_of_file(file, digest.algorithm)
        if hasher.hexdigest() != digest.encoded:
            raise RegistryError("DIGEST_INVALID", {
                "wanted": digest, "size": size, "got": "%s:%s" % (hasher.name, hasher.hexdigest())})

    def cancel(self) -> None:
        with contextlib.suppress(Unknown):  # it has become a blob, or is gone
            with self._open() as file, self._locked(file):  # not while it becomes one
                self._forget()

    def _forget(self) -> None:
        """Delete the session's file, if it is still there. The caller has its lock."""
        if self.path == self.store.layout.foreign_upload_path(self.name, self.id):
            return shutil.rmtree(os.path.dirname(self.path), ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # it has become a blob
            os.unlink(self.path)

    def expire(self, limit: float) -> bool:
        """Forget the session unless somebody has written to it after this Unix time; whether it is
        forgotten."""
        try:
            with self._open() as file, self._locked(file) as status:
                if status.st_mtime >= limit:
                    return False
                self._forget()
        except Unknown:  # it has become a blob, or a crash came before its first byte
            if os.path.exists(self.path):
                return False
            self._forget()
        return True

# -------------------------------------------------------------------------------------------------
# 8  Upkeep
#
# What is done to a store now and then, beside pushes: garbage collection (gc), the expiry of tags,
# and verification. It builds on the store's order of writes. It knows nothing of HTTP.
#
# Why gc deletes nothing that is needed:
# - A run begins by holding the lock alone, and reads the clock then. A push shares the lock while
#   it writes links. So the links of earlier pushes are in place, and later pushes touch theirs
#   after that moment. A file is young if it was touched since, or in the grace period before.
# - The marking takes no lock. It reads what each manifest mentions, which never changes. If one of
#   them, or a tag, can't be read, everything in its repository stays.
# - A thing is deleted only with the lock held alone, and only if it is still old then. To put a
#   manifest is to touch the links of all that it mentions. If that comes first, these are young
#   and stay. If gc comes first, the push is refused, and the client sends what is missing.
# - The order is tags, manifests, links, blobs, and of manifests the parents first. Each step is
#   durable before the next one begins, so a crash leaves at worst content for the next run.
# - A manifest that has become young keeps all that it leads to, for that is still there.
# - Blobs come last, when the links of all repositories are known. A blob that has got its first
#   link since is young: an upload and a mount touch the blob, too.
# -------------------------------------------------------------------------------------------------

# What a repository consists of

MENTIONED = re.compile(rb"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def key_of(digest: str) -> int:
    """128 bits of a digest, or of the one in a FALLBACK_TAG: gc remembers a million digests as
    numbers of 44 bytes each. Digests that share fewer bits could be made on purpose."""
    return int(digest[7:39], 16)


def keys_mentioned(content: bytes) -> FrozenSet[int]:
    """The keys of all digests in a manifest's text.

    These are more than it refers to, and so on the safe side. And no media type has to be known:
    neither one older than Docker's schema 2, nor one newer than this file."""
    if b"\\" in content:
        # What is no JSON hides no digest from anybody.
        with contextlib.suppress(ValueError):
            content += to_json(load_json(content))  # without escapes such as \u0061
    return frozenset(map(key_of, MENTIONED.findall(content)))


class Node(NamedTuple):
    """A manifest of a repository, as gc sees it. The last three are keys (`key_of`)."""

    digest: Digest
    folder: str  # has the repository's link to the manifest
    mentions: FrozenSet[int] = frozenset()
    children: Sequence[int] = ()
    subject: Optional[int] = None


def reachable(roots: Iterable[Any], *edges: Mapping[Any, Iterable[Any]]) -> Set[Any]:
    """The roots, and all that {from: [to, ...]} edges lead to from there."""
    reached: Set[Any] = set()
    todo = list(roots)
    while todo:
        key = todo.pop()
        if key not in reached:
            reached.add(key)
            for edge in edges:
                todo += edge.get(key, ())
    return reached


def batches(entries: Iterable[Any], size: int) -> Iterator[List[Any]]:
    """The entries in lists of at most this size."""
    rest = iter(entries)
    return iter(lambda: list(itertools.islice(rest, size)), [])


def note_result(store: Directory, task: str, **numbers: int) -> None:
    """Keep the result of a task for /metrics; the file's mtime says when."""
    path = os.path.join(store.layout.own, task)
    # The work is done all the same if the disk is full.
    with contextlib.suppress(OSError), open(path, "wb", opener=open_owned) as file:
        file.write(to_json(numbers))


# Expiry of tags

class Expiry(NamedTuple):
    """Which tags go: those that are none of the `keep` that were moved last in their repository,
    and were last moved more than `older_than` seconds ago, and are not `listed(name, tag, digest)`.
    What is listed without a tag (""), such as one platform of an index, stays without it.
    `repositories` is a pattern of the names that are meant."""

    keep: Optional[int] = None
    older_than: Optional[float] = None
    repositories: Any = None
    listed: Optional[Callable[[str, str, Digest], bool]] = None

    @property
    def is_on(self) -> bool:
        """Whether any tag may expire."""
        return (self.keep, self.older_than, self.listed) != (None, None, None)

    def applies_to(self, name: str) -> bool:
        """Whether tags of this repository may expire."""
        is_chosen = not self.repositories or self.repositories.fullmatch(name)
        return self.is_on and bool(is_chosen)

    def choose(self, moved: Dict[str, float], latest: float) -> Set[str]:
        """The tags that go, of those that were last moved at these times; none that was moved after
        `latest`."""
        newest_first = sorted(moved, key=lambda tag: moved[tag], reverse=True)
        return {tag for tag in newest_first[self.keep or 0:] if moved[tag] < latest}

    def doubt_about_clock(self, store: Directory, now: float) -> Optional[str]:
        """A sentence, if the times of the tags and the clock don't fit together."""
        pushed = [(store.pushed(name, tag), image_text(name, tag))
                  for name in store.layout.iter_repositories()
                  for tag in store.layout.list_tags(name)]
        newest, image = max(pushed, default=(now, ""))
        # Where a number of tags stays, a quiet month is no reason to ask.
        longest = IMPLAUSIBLE_AGE if self.keep is not None else 0.0
        if self.keep is not None and newest > now + CLOCK_SLACK:
            consequence = "would count as the newest from now on"
        elif self.older_than is not None and now - newest > max(self.older_than, longest):
            consequence = "was the last that was pushed, so all tags are older than --older-than"
        else:
            return None
        return ("%s, of %s, %s. This machine's clock says %s: if that is right, say --force"
                % (image, local_time(newest), consequence, local_time(now)))


NO_EXPIRY = Expiry()


# Garbage collection

# By the kind of thing, the file in its folder whose mtime says when a client last pushed it, or
# was told of it.
DATED_BY = {"tag": os.path.join("current", "link"), "manifest": "link", "link": "link",
            "blob": "data"}

Entry = Tuple[Any, str]  # a tag or digest, and the folder that goes if it is deleted


class Sweep:
    """How gc deletes: in small batches, so that nobody waits longer than a moment for the lock; and
    only what is old. Something is as old as a file in its folder says (DATED_BY).

    A time that lies in the future, as a wrong clock leaves it behind, becomes now: else it would
    protect for years what it should protect for an hour."""

    def __init__(self, store: Directory, grace: float, dry_run: bool,
                 tell: Callable[[str, str, int], None]) -> None:
        self.store = store
        self.layout = store.layout
        # Clients may have been told of a link TOUCH_AGAIN_AFTER seconds after its mtime.
        self.grace = grace + TOUCH_AGAIN_AFTER if grace else 0.0
        self.dry_run = dry_run
        self.tell = tell         # is called with kind, name, and size of each thing that goes
        self.counts: Dict[str, int] = collections.Counter()  # by kind; and the sum of "bytes"
        self.has_spared = False  # whether anything was young
        self.newest = 0.0        # when the youngest of what goes was touched
        self.now = time.time()

    @property
    def young_since(self) -> float:
        """What was touched at this time, or later, is young."""
        return self.now - self.grace

    def _look(self, path: str, opened: bool = False) -> FileState:
        """As look_at(), with a time in the future mended."""
        state = look_at(path, opened)
        now = max(self.now, time.time())
        if state.mtime > now + CLOCK_SLACK:
            state = state._replace(mtime=now)
            if not self.dry_run:
                # Another process may have deleted it.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
        self.has_spared = self.has_spared or state.mtime >= self.young_since
        return state

    def is_young(self, folder: str) -> bool:
        """Whether the link in a folder must stay. (One that is missing is old.)"""
        return self._look(self.layout.link_in(folder)).mtime >= self.young_since

    def _count(self, kind: str, name: str, size: int = 0) -> None:
        self.counts[kind] += 1
        self.counts["bytes"] += size
        self.tell(kind, name, size)

    def _find_old(self, kind: str, batch: List[Entry],
                  opened: bool = False) -> Dict[Entry, FileState]:
        """The entries that are old, with the states of the files that say so."""
        states = {(reference, folder): self._look(os.path.join(folder, DATED_BY[kind]), opened)
                  for reference, folder in batch}
        return {entry: state for entry, state in states.items() if state.mtime < self.young_since}

    def sweep(self, kind: str, entries: Iterable[Entry], name: Optional[str] = None) -> List[Entry]:
        """Delete the old ones of these entries, of a repository or among the blobs; returns the
        young ones."""
        young: List[Entry] = []
        for batch in batches(entries, SWEEP_BATCH):
            old = self._find_old(kind, batch)
            if old and not self.dry_run:
                old = self._delete(kind, list(old))
            for (reference, _), state in old.items():
                self._count(kind, image_text(name, reference) if name else reference,
                            state.size if kind == "blob" else 0)
                self.newest = max(self.newest, state.mtime)
            young += [entry for entry in batch if entry not in old]
        return young

    def _move_to_trash(self, paths: Iterable[str]) -> List[str]:
        """Move files and folders to the scratch folder; returns their paths there."""
        trash = []
        for path in paths:
            # Another process may have deleted it, or it was never there.
            with contextlib.suppress(FileNotFoundError):
                trash.append(self.store.files.move_to_trash(path))
        return trash

    def _empty_trash(self, trash: List[str]) -> None:
        for path in trash:
            self.store.files.empty_trash(path)

    def _delete(self, kind: str, batch: List[Entry]) -> Dict[Entry, FileState]:
        """Delete what is still old; returns that."""
        began = time.monotonic()
        with self.store.alone():
            waited = time.monotonic() - began
            old = self._find_old(kind, batch, opened=True)
            trash = self._move_to_trash(folder for _, folder in old)
        if kind != "blob":
            # What leads to something is gone for good before that goes. A blob leads nowhere.
            for parent in {os.path.dirname(folder) for _, folder in old}:
                with contextlib.suppress(FileNotFoundError):  # the whole repository is gone
                    sync_path(parent)
        self._empty_trash(trash)
        if waited > 0.001:
            time.sleep(waited)  # those who share the lock get as much time as they had to give
        return old

    def purge(self) -> None:
        """Delete upload sessions that nobody has written to for a day, and what crashes have left
        in the scratch folder. Raises OSError."""
        limit = self.now - UPLOAD_IDLE
        for name, session_id, path in self.layout.iter_uploads():
            session = DirectoryUpload(self.store, name, session_id, path)
            written, size, _ = self._look(path)
            is_idle = (written or self._look(os.path.dirname(path)).mtime) < limit
            if is_idle and (self.dry_run or session.expire(limit)):
                self._count("upload", "%s %s" % (name, session_id), size)
        if not self.dry_run:
            with self.store.lock.alone():
                for folder, _, _ in os.walk(self.layout.uploads, topdown=False):
                    with contextlib.suppress(OSError):  # it has sessions
                        os.rmdir(folder)
        for entry in list_directory(self.store.files.scratch):
            path = os.path.join(self.store.files.scratch, entry)
            # What is not trash may be about to get its final name. A `-` is in the names of locks
            # on blobs that are downloaded, which may be held for days.
            is_idle = "-" not in entry and self._look(path).mtime < limit
            if (is_idle or entry.endswith(".grave")) and not self.dry_run:
                self.store.files.empty_trash(path)


class Collection(Sweep):
    """One run of garbage collection: what goes, and in which order.

    All manifests of a repository stay, unless `untagged` lets those go that no tag or pin leads to:
    from an index to its children, and between a manifest and its subject in both directions.

    With `expiry`, tags go, and with them the manifests to which no other tag leads. A tag that is
    about a manifest (cosign's sha256-HEX.sig) is not one of those that are counted, and goes when
    its manifest goes. If the clock seems wrong, no tag expires without `force`."""

    def __init__(self, store: Directory, grace: float = 0.0, untagged: bool = False,
                 dry_run: bool = False, tell: Callable[[str, str, int], None] = do_nothing,
                 expiry: Expiry = NO_EXPIRY, force: bool = False) -> None:
        super().__init__(store, grace, dry_run, tell)
        self.untagged = untagged
        self.expiry = expiry
        self.force = force
        self.unpinned: AbstractSet[str] = frozenset()  # digests of which the pin does not count
        self.doubt: Optional[str] = None  # a sentence, if the clock seems to be wrong
        self.needed: Set[int] = set()     # the keys of all blobs that stay
        self.unread: List[str] = []       # manifests and tags that can't be read

    def run(self) -> None:
        """Raises OSError: then less was deleted than could be. Raises CommandError if the clock
        seems wrong."""
        with self.store.alone():
            # This asks for the time of the file system, which may be another host's.
            os.utime(self.store.lock.path)
            self.now = os.stat(self.store.lock.path).st_mtime
        if self.expiry.is_on:
            self.doubt = self.expiry.doubt_about_clock(self.store, self.now)
            if self.doubt and not self.force and not self.dry_run:
                raise CommandError(self.doubt)
        self.purge()
        for name in self.layout.iter_repositories():
            self.collect_repository(name)
            self._sweep_empty(name)
        self.sweep("blob", ((digest, folder) for digest, folder in self.layout.iter_blobs()
                             if key_of(digest) not in self.needed))

    def collect_repository(self, name: str) -> None:
        """Mark and sweep one repository; note which blobs it needs. Raises OSError."""
        unread_before = len(self.unread)
        nodes = self._read_manifests(name)
        tags = {}
        if self.untagged or self.expiry.applies_to(name):
            tags = self._read_tags(name)
        is_readable = len(self.unread) == unread_before
        if is_readable:
            staying, going_tags = self._mark(name, nodes, tags)
            self.sweep("tag", [(tag, self.layout.tag_path(name, tag)) for tag in going_tags], name)
            self._sweep_manifests(name, nodes, staying)
        needed = set(nodes).union(*(node.mentions for node in nodes.values()))
        self._sweep_links(name, needed, is_readable)
        self.needed |= needed

    # Marking

    def _read_manifests(self, name: str) -> Dict[int, Node]:
        """All manifests of a repository, by their keys."""
        nodes = {}
        for digest, folder in self.layout.iter_revisions(name):
            if os.path.exists(self.layout.link_in(folder)):
                nodes[key_of(digest)] = self._read_manifest(name, digest, folder)
        return nodes

    def _read_manifest(self, name: str, digest: Digest, folder: str) -> Node:
        content = self.layout.manifest_content(digest)
        if content is None:
            self.unread.append(image_text(name, digest))
            return Node(digest, folder)
        manifest = Manifest(content, digest)
        children: List[int] = []
        subject: Optional[int] = None
        # One of a type that we don't know has neither; what it mentions stays with it.
        with contextlib.suppress(Invalid):
            if manifest.subject:
                subject = key_of(manifest.subject)
            children = [key_of(child.digest) for child in manifest.manifests]
        return Node(digest, folder, keys_mentioned(content), children, subject)

    def _read_tags(self, name: str) -> Dict[str, Digest]:
        tags = {}
        for tag in self.layout.list_tags(name):
            folder = self.layout.current_path(name, tag)
            digest = self.layout.read_link(folder)
            if digest:
                tags[tag] = digest
            elif os.path.exists(self.layout.link_in(folder)):
                self.unread.append(image_text(name, tag))
        return tags

    def _expired_tags(self, name: str, tags: Dict[str, Digest]) -> Set[str]:
        """The tags that go by the rules of expiry.

        If only expired tags point to a manifest, and a client was just told of it, the tags stay
        with it: without them no later run would know that it was to go."""
        moved = {tag: self.store.pushed(name, tag) for tag in tags}
        due = self.expiry.choose(moved, self.now - (self.expiry.older_than or 0.0))
        if self.expiry.listed:
            due = {tag for tag in due if not self.expiry.listed(name, tag, tags[tag])}
        expired = {tag for tag in due if moved[tag] < self.young_since}
        self.has_spared = self.has_spared or expired != due
        kept = {tags[tag] for tag in tags.keys() - expired}
        return {tag for tag in expired if tags[tag] in kept
                or not self.is_young(self.layout.revision_path(name, tags[tag]))}

    def _mark(self, name: str, nodes: Dict[int, Node], tags: Dict[str, Digest]
              ) -> Tuple[Set[int], List[str]]:
        """The keys of the manifests that stay, and of all that they mention; and the tags that go.

        What stays are the manifests that tags and pins lead to, and those that are young; without
        `untagged` also all that no expired tag has led to."""
        expired: Set[str] = set()
        attached: Set[str] = set()  # tags that are about a manifest, and go with it
        if self.expiry.applies_to(name):
            fallback = set(filter(FALLBACK_TAG.fullmatch, tags))
            attached = {tag for tag in fallback if key_of(tag) in nodes}
            expired = self._expired_tags(
                name, {tag: tags[tag] for tag in tags if tag not in fallback})
        mentions = {key: node.mentions for key, node in nodes.items()}
        referrers: Dict[Optional[int], List[int]] = {}
        for key, node in nodes.items():
            referrers.setdefault(node.subject, []).append(key)
        for tag in attached:
            referrers.setdefault(key_of(tag), []).append(key_of(tags[tag]))
        roots = [tags[tag] for tag in tags.keys() - expired - attached]
        roots += set(self.store.pinned(name)).difference(self.unpinned)
        if self.expiry.listed and self.expiry.applies_to(name):
            roots += [node.digest for node in nodes.values()
                      if self.expiry.listed(name, "", node.digest)]
        staying = reachable(map(key_of, roots), mentions, referrers)
        if not self.untagged:
            # Only what belongs to an expired tag goes: its manifest, the children of that, and the
            # referrers of these. What else they mention, such as a base image, does not go along.
            children = {key: node.children for key, node in nodes.items()}
            doomed = reachable([key_of(tags[tag]) for tag in expired], children, referrers)
            # All the rest stays, with what it mentions. It keeps no referrers: one that is doomed
            # had a tag of its own, which has expired. What is doomed and stays all the same does
            # keep its referrers.
            staying |= reachable(nodes.keys() - doomed, mentions,
                                 {key: referrers.get(key, ()) for key in doomed})
        young = [key for key in nodes.keys() - staying if self.is_young(nodes[key].folder)]
        staying |= reachable(young, mentions, referrers)
        return staying, sorted(expired.union(tag for tag in attached if key_of(tag) not in staying))

    # Sweeping

    def _sweep_manifests(self, name: str, nodes: Dict[int, Node], staying: Set[int]) -> None:
        """Delete the manifests that don't stay, from `nodes` as well. One goes only when no
        manifest that is still there mentions it: parents go first, and one that has become young
        keeps all that it leads to."""
        while True:
            kept = staying.union(*(node.mentions for node in nodes.values()))
            going = [(node.digest, node.folder) for key, node in nodes.items() if key not in kept]
            if not going:
                return
            young = self.sweep("manifest", going, name)
            staying = staying.union(key_of(digest) for digest, _ in young)
            for digest, _ in set(going).difference(young):
                del nodes[key_of(digest)]

    def _need_blob(self, digest: Digest, folder: str) -> None:
        """Keep the blob to which a repository's link leads."""
        self.needed.add(key_of(digest))
        if digest.algorithm != "sha256":  # Distribution stored it by its sha256, as the link says
            self.needed.add(key_of(self.layout.read_link(folder) or digest))

    def _sweep_links(self, name: str, needed: Set[int], is_readable: bool) -> None:
        """Delete the links that lead to no blob that the repository needs; keep the blobs of all
        others."""
        def unneeded() -> Iterator[Entry]:
            for digest, folder in self.layout.iter_layers(name):
                if is_readable and key_of(digest) not in needed:
                    yield digest, folder
                else:
                    self._need_blob(digest, folder)

        for digest, folder in self.sweep("link", unneeded(), name):
            self._need_blob(digest, folder)

    def _empty_folders(self, path: str) -> List[str]:
        """The folders of a repository; [] if a file is left in one of them. Raises OSError."""
        folders = [os.path.join(path, entry) for entry in list_directory(path) if entry[0] == "_"]
        walks = [os.walk(folder, onerror=raise_unless_gone) for folder in folders]
        return [] if any(files for _, _, files in itertools.chain(*walks)) else folders

    def _sweep_empty(self, name: str) -> None:
        """Delete a repository in which no file is left, and the folders above it that are empty."""
        path = self.layout.repository_path(name)
        if self.dry_run or not self._empty_folders(path):
            return
        with self.store.alone():
            folders = self._empty_folders(path)
            if not folders:
                return  # a push has come meanwhile
            trash = self._move_to_trash(folders + [self.layout.pins_path(name),
                                          self.layout.referrers_path(name)])
            # Another repository may be below.
            with contextlib.suppress(OSError):
                while path != self.layout.repositories:
                    os.rmdir(path)
                    path = os.path.dirname(path)
        sync_path(path)
        self._empty_trash(trash)
        self._count("repository", name)

    # What more could go

    def waiting_bytes(self) -> Tuple[int, float]:
        """After run(): how many bytes have stayed only because they are young, and until when."""
        if not self.has_spared:
            return 0, 0.0
        later = Collection(self.store, untagged=self.untagged, dry_run=True, expiry=self.expiry)
        later.run()
        size = later.counts["bytes"] - (self.counts["bytes"] if self.dry_run else 0)
        return size, later.newest + self.grace


def collect_garbage(store: Directory, **settings: Any) -> Collection:
    """Run a Collection with these settings, and return it. Raises what run() raises, and
    BlockingIOError if another process collects garbage."""
    with open(store.layout.collected, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        collection = Collection(store, **settings)
        collection.run()
        if not collection.dry_run:
            note_result(store, "gc", freed_bytes=collection.counts["bytes"])
    return collection


def freed_bytes(store: Directory, name: str, grace: float,
                going: AbstractSet[str] = frozenset()) -> Tuple[int, float]:
    """How many bytes gc would free in one repository if all that is untagged went, and the tags and
    pinned digests that are `going`, and from when on. That is the most: another repository may need
    some of them."""
    expiry = Expiry(listed=lambda name, tag, digest: bool(tag) and tag not in going)
    later = Collection(store, untagged=True, dry_run=True, expiry=expiry)
    later.unpinned = going
    later.collect_repository(name)
    size = sum(look_at(store.layout.blob_path(digest)).size
               for digest in store.layout.linked(name) if key_of(digest) not in later.needed)
    return size, later.newest + grace + TOUCH_AGAIN_AFTER


# Verification

DANGLING = "link to a missing blob"
LEFTOVER = "link that no image needs"
MOVABLE = ("damaged link", DANGLING, "tag without manifest")


class Finding(NamedTuple):
    """One thing that is wrong."""

    what: str
    name: str  # a digest, a tag, or in words what can't be read
    path: str  # the file, or the archive


class Verification:
    """One reading of everything, in a store or in archives, and what came of it. `progress(blobs,
    bytes)` is called for each block; `rate` limits the reading to so many bytes a second."""

    def __init__(self, progress: Callable[[int, int], None] = do_nothing, rate: int = 0) -> None:
        self.progress = progress
        self.rate = Rate(rate)
        self.blobs = 0
        self.bytes = 0
        self.damaged: Dict[Digest, Finding] = {}
        self.findings: Dict[Finding, Set[str]] = {}  # with the images that each of them harms
        self.left_out: Set[Digest] = set()  # blobs that whoever made an archive left out of it
        self.leftovers: List[str] = []      # links as Distribution's garbage collection leaves them
        self.moved: List[str] = []          # where damaged files are now
        self.unsigned: List[str] = []       # images that no key of --signed-by has signed
        self.mutex = threading.Lock()

    def count(self, size: int, blobs: int = 0) -> None:
        """Count what has been read. Any thread may call it; it waits if reading is too fast."""
        with self.mutex:
            self.blobs += blobs
            self.bytes += size
            self.progress(self.blobs, self.bytes)
        self.rate.wait(size)

    def add(self, finding: Finding, *images: str) -> None:
        """Add a finding, or more images that it harms."""
        self.findings.setdefault(finding, set()).update(images)

    def add_damage(self, digest: Digest, path: str) -> None:
        """Add a blob that can't be read, or is not what its digest says."""
        self.damaged[digest] = Finding("damaged blob", digest, path)
        self.add(self.damaged[digest])


class StoreVerification(Verification):
    """The verification of a store, beside pushes; if (repository, reference) of some images are
    given, of their blobs and their repositories. With `repair` it moves away what is damaged or
    leads nowhere, and deletes links that no image needs."""

    def __init__(self, store: Directory, progress: Callable[[int, int], None] = do_nothing,
                 rate: int = 0, repair: bool = False,
                 images: Sequence[Tuple[str, str]] = ()) -> None:
        super().__init__(progress, rate)
        self.store = store
        self.images = images
        self.repair = repair
        self.layout = store.layout
        self.states: Dict[str, FileState] = {}  # of the damaged files

    def run(self) -> None:
        """Raises OSError."""
        self._read_blobs()
        for name in dict(self.images) or self.layout.iter_repositories():
            findings = self._check_repository(name)
            if findings:
                self._confirm(name, findings)
        if self.repair:
            for path, state in self.states.items():
                self._move_if_same(path, state)
            # The index of referrers is made anew when it is needed.
            shutil.rmtree(os.path.join(self.layout.own, "referrers"), ignore_errors=True)
        if not self.images:
            note_result(self.store, "verify", findings=len(self.findings), read_bytes=self.bytes)

    def _confirm(self, name: str, findings: Dict[Finding, Set[str]]) -> None:
        """Look again, because a deletion may have been under way; add and repair what is still
        so."""
        with self.store.alone() if self.repair else contextlib.ExitStack():
            for finding, images in self._check_repository(name).items():
                if finding in findings and finding.what == LEFTOVER:
                    self.leftovers.append(finding.path)
                    if self.repair:
                        self.store.files.remove(os.path.dirname(finding.path))
                elif finding in findings:
                    self.add(finding, *images)
                    if self.repair and finding.what in MOVABLE:
                        self.moved.append(self.store.quarantine(finding.path))

    def _move_if_same(self, path: str, state: FileState) -> None:
        """Move a damaged blob away, unless a push has replaced it since it was read."""
        with self.store.alone():
            # The mtime does not count: a client's request changes it, too.
            if look_at(path)._replace(mtime=state.mtime) == state:
                self.moved.append(self.store.quarantine(path))

    # Reading blobs

    def _iter_blobs(self) -> Iterator[Entry]:
        """The blobs that are to be read, with their folders."""
        if not self.images:
            return self.layout.iter_blobs()
        needed = [consists_of(self.store, name, resolve_reference(self.store, name, reference))
                  for name, reference in self.images]
        return ((digest, os.path.dirname(self.layout.blob_path(digest)))
                for digest in set().union(*needed))

    def _read_blobs(self) -> None:
        """Hash every blob, in as many threads as there are processors; hashlib lets them run at
        the same time. Raises OSError."""
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            for batch in batches(self._iter_blobs(), 1000):
                list(pool.map(self._read_blob, batch))

    def _read_blob(self, entry: Entry) -> None:
        digest, folder = entry
        path = os.path.join(folder, "data")
        state, is_intact = look_at(path), False
        try:
            with open(path, "rb", buffering=0) as file:
                hasher = hash_of_file(file, digest.algorithm, self.count)
                is_intact = hasher.hexdigest() == digest.encoded
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the disk can't read it any more
                raise
        self.count(0, 1)
        if not is_intact:
            self.states[path] = state
            self.add_damage(digest, path)

    # Following links

    def _check_repository(self, name: str) -> Dict[Finding, Set[str]]:
        """What is wrong in one repository, and the images that each finding harms."""
        findings: List[Finding] = []
        needs = self._read_links(findings, self.layout.iter_layers(name), LEFTOVER)
        revisions = self._read_links(findings, self.layout.iter_revisions(name), DANGLING)
        needs.update(revisions)  # {tag or digest: the digests that it can't do without}
        present = set(needs)
        for digest in revisions:
            blobs, children = self.store.needs(Digest(digest))
            needs[digest] = needs[digest] + blobs + children
            findings += [Finding("missing blob", blob, self.layout.layer_path(name, blob))
                         for blob in blobs if blob not in present]
        tags = {tag: self.layout.current_path(name, tag) for tag in self.layout.list_tags(name)}
        targets = self._read_links(findings, tags.items())
        needs.update(targets)
        findings += [Finding("tag without manifest", tag, self.layout.link_in(tags[tag]))
                     for tag, digests in targets.items() if digests[0] not in revisions]
        for tag in tags:
            # What a tag pointed to earlier may be gone; the link itself must not be damaged.
            self._read_links(findings, digest_folders(self.layout.tag_path(name, tag), "index"))
        harmed: Dict[str, Set[str]] = {finding.name: set() for finding in findings}
        for image in itertools.chain(tags, revisions.keys() - reachable(tags, needs)):
            for needed in reachable([image], needs).intersection(harmed):
                harmed[needed].add(image_text(name, image))
        return {finding._replace(what=DANGLING)
                if finding.what == LEFTOVER and harmed[finding.name] else finding:
                harmed[finding.name] for finding in findings}

    def _read_links(self, findings: List[Finding], entries: Iterable[Tuple[str, str]],
                    if_missing: str = "") -> Dict[str, List[Digest]]:
        """{digest or tag: [the digest that its link names]} of these entries, which have the folder
        of the link; adds what is wrong with links and blobs. `if_missing` is the problem of a link
        to a blob that is not there; without it that is none."""
        targets: Dict[str, List[Digest]] = {}
        for name, folder in entries:
            path = self.layout.link_in(folder)
            target = self.layout.read_link(folder)
            if target is None:
                if os.path.exists(path):
                    findings.append(Finding("damaged link", name, path))
            elif if_missing and not os.path.isfile(self.layout.blob_path(target)):
                findings.append(Finding(if_missing, name, path))
            else:
                targets[name] = [target]
                if target in self.damaged:
                    findings.append(self.damaged[target])
        return targets

# -------------------------------------------------------------------------------------------------
# 9  Archive
#
# Images in files: tars and directories. An archive is read in place: to open it, we read its
# headers (of a directory, its names) and the small files that say what it holds, but no layers.
# Several files are one registry: the parts of a split archive, or a difference and what it builds
# on. Nothing in an archive is trusted: we check what it claims, and make no path of its names.
# -------------------------------------------------------------------------------------------------

BLOCK = 512                  # bytes; everything in a tar takes whole blocks
TAR_END = bytes(2 * BLOCK)
SPOOL_BLOCK = 1 << 20        # bytes read at once from a stream
XZ_BLOCK = 8 << 10           # … of xz, which may make seven thousand times as much of them
MIN_SPARE = 64 << 20         # bytes of the disk that unpacking leaves free
MAX_UNPACKER = 256 << 20     # bytes of memory for decompressing xz; zstd has a limit of its own
MAX_TAR_TEXT = 64 << 10      # bytes of a long name or pax header; a path has 4 KiB on Linux
MAX_INDEX = 20 << 20         # bytes of index.json, manifest.json; docker and containerd refuse more
TAR_FILES = (b"\0", b"0", b"7")
# Headers that describe the member after them; for GNU's L and K, what of it they contain.
TAR_TEXTS = {b"x": "", b"g": "", b"L": "path", b"K": "linkpath"}
# A blob with many zeros may have the same range often. But an archive that says so of a thousand
# times its size would keep us reading for hours.
MAX_CLAIMED = 100            # bytes of joined blobs for each byte that is there
MAX_REACHES = 64             # repositories for which an archive remembers what they contain
MAX_LINKS = 40               # links that lead to links; Linux follows as many

REF_NAME = "org.opencontainers.image.ref.name"
BASE_NAME = "org.opencontainers.image.base.name"  # the image's own name, in old packages of zarf
IMAGE_NAME = "io.containerd.image.name"
SUBJECT = "io.containerd.manifest.subject"  # on a referrer; read by containerd and Docker 29
OWN_NAME = "tinyreg.name"                   # the name here, while other tools need one with a host
PARTS = "tinyreg-parts.json"                # see Parts

# By the kind that cosign save and hauler write of a manifest, how cosign's tag for it ends. "" is
# the image; "@" is a referrer, which needs no tag.
COSIGN_KIND = re.compile(r"dev\.(?:cosignproject\.cosign|hauler)/([^/]+)")
COSIGN_KINDS = {"image": "", "imageIndex": "", "sigs": ".sig", "atts": ".att", "sboms": ".sbom",
                "referrers": "@"}
HAULER_SUBJECT = "hauler.dev/subject-digest"  # if it is not the image of the same name

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz",
                b"BZh": "bzip2"}  # by the first bytes of a file
# The modules that decompress. A Python may lack one, zstd's before 3.14: then the command does it.
DECOMPRESSORS = {"gzip": "gzip", "zstd": "compression.zstd", "xz": "lzma", "bzip2": "bz2"}

# A file by which a folder with images is recognized; group 1 is that folder.
ARCHIVE_ROOT = re.compile(
    r"(?s)((?:.+?/)?)"
    r"(?:index\.json|manifest\.json|docker/registry/v2/(?:blobs|repositories)/.+"
    r"|blob/sha256[-:][0-9a-f]{64})")
DAMAGED = re.compile("(?:^|/)tinyreg/damaged/")  # a store puts damaged files there
NAMED_BY_DIGEST = re.compile(r"(?s)(?:.*[/:]|(?:.*/)?sha256-)?([0-9a-f]{64}|[0-9a-f]{128})"
                             r"(?:/data|\.tar|\.tar\.gz|\.manifest\.json)?")
PAX_RECORD = re.compile(rb"([0-9]{1,5}) ([^=\n]+)=")
TREE_LINK = re.compile(r"docker/registry/v2/repositories/(%s)/_manifests/"
                       r"(?:tags/(%s)/current|revisions/[^/]+/[^/]+)/link"
                       % (NAME.pattern, TAG.pattern))
# manifests/HOST/NAME/reference/TAG, manifests/HOST/NAME/digest/sha256-HEX; a port is _PORT_
CACHE_ENTRY = re.compile(r"(?s)manifests/([^/]+?)_?/(.+)/"
                         r"(?:digest/sha256[-:][0-9a-f]{64}|[^/]+/([^/]+))")


# Members: where the bytes lie

class Member(NamedTuple):
    """A file in an archive: a slice of a tar, or a file in a directory."""

    path: str                # of the tar, or of the file itself
    tar: Optional[BinaryIO]  # None in a directory
    offset: int
    length: int

    def open(self) -> Blob:
        """Raises OSError."""
        # An unpacked tar has no name to open it by, so an open tar's descriptor is copied.
        file = open(os.dup(self.tar.fileno()) if self.tar else self.path, "rb", buffering=0)
        return Blob(file, self.offset, self.length)

    def read(self, limit: int = MAX_MANIFEST) -> bytes:
        """The content. Raises ValueError if it is longer than `limit` bytes."""
        if self.length > limit:
            raise ValueError("a file of %d bytes that should be small" % self.length)
        with self.open() as blob:
            return blob.read(limit)


class JoinedBlob(Blob):
    """A blob that was cut into ranges. Each range is a member, and only open while it is read. So
    a blob in a thousand ranges takes one descriptor."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.ends = list(itertools.accumulate(member.length for member in members))
        super().__init__(None, 0, self.ends[-1])

    def open(self) -> Blob:
        """The same blob, to be read from its first byte."""
        return self.rest(0)

    def readinto(self, view: memoryview) -> int:
        view = view[:self.length - self.position]
        if not view:
            return 0
        start = self.offset + self.position
        index = bisect.bisect_right(self.ends, start)
        with self.members[index].open() as blob:
            count = blob.rest(blob.length - (self.ends[index] - start)).readinto(view)
        self.position += count
        return count


def read_digest(member: Union[Member, JoinedBlob], algorithm: str = "sha256") -> Digest:
    """The digest of the content, which is read for it. Raises OSError."""
    hasher = hashlib.new(algorithm)
    with member.open() as blob:
        copy_bytes(blob, blob.length, hasher.update)
    return Digest("%s:%s" % (algorithm, hasher.hexdigest()))


# Reading tars


def padded(length: int) -> int:
    """The bytes that so many bytes take in a tar."""
    return -(-length // BLOCK) * BLOCK


def parse_pax_records(text: bytes) -> Dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header, by key. Raises ValueError."""
    records: Dict[str, str] = {}
    end = 0
    while end < len(text):
        match = PAX_RECORD.match(text, end)
        end += int(match[1]) if match else 0
        if not match or not match.end() < end <= len(text):
            raise ValueError("malformed pax header")
        key, value = map(os.fsdecode, (match[2], text[match.end():end - 1]))
        if key.startswith("GNU.sparse"):
            raise ValueError("refused: it has a sparse file")
        if key == "size" and not COUNT.fullmatch(value):
            raise ValueError("malformed pax header")
        records[key] = value
    return records


def read_tar_header(tar: BinaryIO, offset: int) -> Optional[tarfile.TarInfo]:
    """The header at an offset; None at the end of the tar. Raises ValueError."""
    header = os.pread(tar.fileno(), BLOCK, offset)
    if header == bytes(BLOCK):
        return None
    try:
        entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # too short, or not what its checksum says
        problem = "damaged header at byte %d" % offset
        if len(header) < BLOCK:
            problem = "it is cut off: copy it again"
        raise ValueError(problem if offset else "not a tar file")
    entry.offset_data = offset + BLOCK
    return entry


def read_tar_text(tar: BinaryIO, entry: tarfile.TarInfo) -> Dict[str, str]:
    """What a pax header or a GNU long name says of the member after it. Raises ValueError."""
    if entry.size > MAX_TAR_TEXT:
        raise ValueError("a header of %d bytes" % entry.size)
    text = os.pread(tar.fileno(), entry.size, entry.offset_data)
    if entry.type == b"x":
        return parse_pax_records(text)
    return {TAR_TEXTS[entry.type]: os.fsdecode(text.rstrip(b"\0"))}


def iter_tar(tar: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files and links of a tar in its order, by seeking from header to header.

    Reads old, GNU and pax tars. Raises ValueError for what is no tar, is damaged or cut off, or has
    a sparse file or a device. The standard library reads single headers only, because its TarFile
    skips a damaged one in silence, so that what follows would just be missing; and because what it
    does with the texts of an enemy differs from version to version."""
    size, offset = os.fstat(tar.fileno()).st_size, 0
    texts: Dict[str, str] = {}
    while True:
        entry = read_tar_header(tar, offset)
        if entry is None:
            return
        if entry.type not in TAR_TEXTS:
            for field in "path", "linkpath", "size":
                setattr(entry, field, texts.get(field, getattr(entry, field)))
            entry.size = int(entry.size) if entry.type in TAR_FILES else 0
            texts = {}
        if not 0 <= entry.size <= size - entry.offset_data:
            raise ValueError("%.200r is larger than the rest of the archive, which is damaged or "
                             "cut off; copy it again" % entry.name)
        offset = entry.offset_data + padded(entry.size)
        if entry.type in TAR_TEXTS:
            texts.update(read_tar_text(tar, entry))
        elif entry.type in TAR_FILES or entry.islnk() or entry.issym():
            if not entry.name.endswith("/"):  # so an old tar says that this is a folder
                yield entry
        elif not entry.isdir():
            raise ValueError("refused: %.200r is a device, a sparse file or of an unknown kind"
                             % entry.name)


def inner_path(name: str) -> str:
    """A name in an archive, normalized. Raises ValueError if it leads out of the archive."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError("refused: %.200r leads out of the archive" % name)
    return os.path.normpath(name)


def read_tar(path: str, tar: BinaryIO, members: Dict[str, Member]) -> None:
    """Add the files of a tar to `members`, by their names and by those of links to them.

    If it raises ValueError, `members` has the files before the damage."""
    links: Dict[str, str] = {}
    for entry in iter_tar(tar):
        name, member = inner_path(entry.name), Member(path, tar, entry.offset_data, entry.size)
        if entry.type not in TAR_FILES:
            # The target of a symbolic link starts at the link's folder, a hard link's at the top.
            folder = "" if entry.islnk() else os.path.dirname(entry.name)
            links[name] = inner_path(os.path.normpath(os.path.join(folder, entry.linkname)))
        elif name not in members:
            members[name] = member
        elif (members[name].length != member.length
              or read_digest(members[name]) != read_digest(member)):
            raise ValueError("refused: it has two files %.200r that differ" % entry.name)
    for name, target in links.items():
        for _ in range(MAX_LINKS):
            target = links.get(target, target)
        if target in members:
            members.setdefault(name, members[target])


def read_folder(top: str) -> Dict[str, Member]:
    """The files below a directory, by name. Raises ValueError, OSError."""
    members = {}
    for folder, _, files in os.walk(top):
        for path in (os.path.join(folder, file) for file in files):
            if os.path.islink(path):
                raise ValueError("refused: %r is a link" % path)
            if os.path.isfile(path):
                members[os.path.relpath(path, top)] = Member(path, None, 0, os.path.getsize(path))
    return members


def find_compression(start: bytes) -> Optional[str]:
    """The name of the compression, by the first bytes of a file; None if it has none."""
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def stream_error(error: object) -> ValueError:
    """What to raise for an error, or the words, of a decompressor."""
    if "emory" in repr(error):
        return ValueError("to decompress it takes more memory than it may or can have; if you "
                          "trust it, decompress it first")
    return ValueError("damaged: %s" % error)


def iter_blocks(source: Any, size: int = SPOOL_BLOCK) -> Iterator[bytes]:
    """Yield what a stream's `read` gives."""
    return iter(functools.partial(source.read, size), b"")


def iter_xz(lzma: Any, source: BinaryIO) -> Iterator[bytes]:
    """Yield what an xz file holds. lzma.open() would take the memory that the file asks for."""
    decompressor = None
    for block in iter_blocks(source, XZ_BLOCK):
        # Streams may follow one another, with zeros between them.
        while decompressor or block.strip(b"\0"):
            if not decompressor:
                block = block.lstrip(b"\0")
                decompressor = lzma.LZMADecompressor(memlimit=MAX_UNPACKER)
            yield decompressor.decompress(block)
            if not decompressor.eof:
                break
            block, decompressor = decompressor.unused_data, None
    if decompressor:
        raise EOFError("it is cut off")


def unpack(blocks: Iterable[bytes], scratch: str) -> BinaryIO:
    """A nameless file with all blocks of a stream; unlike a stream, a file can be read in any
    order. Raises OSError, and ValueError if the stream is damaged or too large."""
    file = tempfile.TemporaryFile(dir=scratch)
    try:
        for block in blocks:
            file.write(block)
            if shutil.disk_usage(scratch).free < MIN_SPARE:
                raise ValueError("unpacked it does not fit on the disk of %s" % scratch)
        file.flush()
    except Exception as error:  # each decompressor has its own class of errors
        # An OSError with an errno is the disk's; gzip and bz2 raise OSError without one.
        if isinstance(error, ValueError) or getattr(error, "errno", None):
            raise
        raise stream_error(error)
    return file


def unpack_by_command(program: str, source: BinaryIO, scratch: str) -> BinaryIO:
    """What the program makes of a compressed file. Raises ValueError, OSError."""
    try:
        limit = ["-M%d" % MAX_UNPACKER] * (program == "xz")
        process: Any = subprocess.Popen([program, "-dc"] + limit, stdin=source,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise ValueError("it is compressed with %s; install %s, or decompress it first"
                         % (program, program))
    with process:  # whoever leaves early closes the pipe, and so ends the program
        file = unpack(iter_blocks(process.stdout), scratch)
        errors = process.stderr.read().decode("ascii", "replace")
    if process.returncode:
        raise stream_error("%s says: %s" % (program, " ".join(errors.split())))
    return file


def open_tar(path: str, scratch: str = "") -> BinaryIO:
    """A tar as an open file; compressed ones and stdin (`-`) only with a scratch folder.

    Raises ValueError, OSError."""
    is_stdin = path == "-" and scratch
    source: BinaryIO = open(0 if is_stdin else path, "rb", closefd=not is_stdin)
    if scratch and not source.seekable():  # a pipe
        source = unpack(iter_blocks(source), scratch)
    packed = find_compression(os.pread(source.fileno(), 8, 0))
    if not packed:
        return source
    if not scratch:
        raise ValueError("it is compressed with %s; decompress it first" % packed)
    source.seek(0)
    try:
        module = importlib.import_module(DECOMPRESSORS[packed])
    except ImportError:
        return unpack_by_command(packed, source, scratch)
    return unpack(iter_xz(module, source) if packed == "xz" else iter_blocks(module.open(source)),
                  scratch)


# Names in archives

def default_name(path: str) -> str:
    """The repository for images without a name, by their file: `demo` for /media/Demo.tar."""
    name = os.path.basename(os.path.abspath(path)).lower()
    suffixes_and_signs = r"(?:\.(?:tar|oci|t?(?:gz|zst|xz|bz2)))+$|[^a-z0-9]+"
    return re.sub(suffixes_and_signs, "-", name).strip("-") or "images"


def parse_own_image(text: str) -> Tuple[str, str]:
    """The repository, and the tag or digest, of an image as tinyreg writes it.

    Raises NAME_INVALID, MANIFEST_INVALID, DIGEST_INVALID."""
    name, reference = split_image(text)
    return name, reference or "latest"


def parse_docker_image(text: str) -> Tuple[str, str]:
    """The repository here, and the tag or digest, of an image as docker writes it: without the
    host if that is docker.io. Raises NAME_INVALID, MANIFEST_INVALID, DIGEST_INVALID."""
    image = parse_image(text)
    return image.stored_name, image.reference


def folder_image(folder: str, default: str) -> Tuple[str, str]:
    """The repository, and the tag or digest, for an image that has a folder to itself.

    skopeo sync calls the folder NAME:TAG or HOST/NAME:TAG; others are `default`, tag latest."""
    if re.search("[:@]", os.path.basename(folder)):
        for parse in parse_own_image, parse_docker_image:
            with contextlib.suppress(Invalid):  # if it has a port, only docker's way fits
                return parse(folder)
    return default, "latest"


def find_entry_name(annotations: Dict[str, Any], default: str,
                    *more_keys: str) -> Optional[Tuple[str, str]]:
    """The repository, and the tag or digest, that an entry of index.json names; None if it names
    none. Of the keys, OWN_NAME counts before containerd's, and that before the OCI's, which may
    be only a tag."""
    for key in (OWN_NAME, IMAGE_NAME, REF_NAME) + more_keys:
        text = annotations.get(key)
        if isinstance(text, str):
            with contextlib.suppress(Invalid):  # others write there what they like
                if key == OWN_NAME:
                    return parse_own_image(text)
                if key == REF_NAME and "/" not in text and ":" not in text:
                    return default, parse_tag(text)
                return parse_docker_image(text)
    return None


def full_name(name: str) -> str:
    """A repository's name for other tools: with its origin, which is docker.io if it has none."""
    host, slash, path = name.partition("/")
    if has_origin(name):
        return re.sub(r"_([0-9]+)$", r":\1", host) + "/" + path
    return "docker.io/" + ("" if slash else "library/") + name


def find_digest_in(path: str) -> Optional[Digest]:
    """The digest by which a file is named, as blobs are in most archives; None if it isn't."""
    match = NAMED_BY_DIGEST.fullmatch(path)
    if not match:
        return None
    encoded = match[1]
    return Digest("%s:%s" % ("sha256" if len(encoded) == 64 else "sha512", encoded))


# What archives contain

def expect(kind: type, value: Any) -> Any:
    """The value, if it is of this kind. Raises ValueError."""
    if not isinstance(value, kind):
        raise ValueError("malformed index.json, manifest.json or " + PARTS)
    return value


def parse_digests(values: Any) -> List[Digest]:
    """Raises ValueError, DIGEST_INVALID."""
    return [parse_digest(expect(str, value)) for value in expect(list, values)]


def read_diff_ids(member: Member) -> List[Any]:
    """The digests of an image's unpacked layers, as its config has them. Raises ValueError."""
    rootfs = expect(dict, load_json(member.read()).get("rootfs") or {})
    return expect(list, rootfs.get("diff_ids") or [])


class Part(NamedTuple):
    """One file of a split archive."""

    archive: Digest  # of PARTS, which is the same in all files of one archive
    number: int      # from 1


class Parts:
    """What the file PARTS says, in split archives and in those made with --have.

    It is a JSON object: `files` are the names of all parts; `joined` has, by the digest of each
    blob that was cut, the digests of its ranges; `holds` are the digests in each part; `left_out`
    are the digests of blobs that the far side was known to have. The first versions of tinyreg
    wrote only `files` and `joined`."""

    def __init__(self) -> None:
        self.names: Dict[Digest, List[str]] = {}      # by archive; the first one's part is 1
        self.ranges: Dict[Digest, List[Digest]] = {}  # of blobs that were cut
        self.holders: Dict[Digest, Set[Part]] = {}    # of blobs and ranges
        self.given: Set[Part] = set()
        self.left_out: Set[Digest] = set()

    def add(self, table: Member, present: Set[Optional[Digest]]) -> None:
        """Take in the PARTS of a file that has the blobs `present`. Raises ValueError,
        DIGEST_INVALID, OSError."""
        document = load_json(table.read(MAX_INDEX))
        for digest, ranges in expect(dict, document.get("joined")).items():
            self.ranges[parse_digest(digest)] = parse_digests(ranges)
        self.left_out.update(parse_digests(document.get("left_out") or []))
        names = [expect(str, name) for name in expect(list, document.get("files"))]
        if "holds" not in document:
            return
        holds = [parse_digests(digests) for digests in expect(list, document["holds"])]
        if len(holds) != len(names):
            raise ValueError("malformed " + PARTS)
        archive = read_digest(table)
        self.names[archive] = names
        for number, digests in enumerate(holds, 1):
            for digest in digests:
                self.holders.setdefault(digest, set()).add(Part(archive, number))
            if present.issuperset(digests):
                self.given.add(Part(archive, number))

    def join(self, blobs: Dict[Digest, Member]) -> Dict[Digest, JoinedBlob]:
        """The blobs that were cut, and of which all ranges are there. Raises ValueError."""
        joined = {digest: JoinedBlob([blobs[part] for part in ranges])
                  for digest, ranges in self.ranges.items()
                  if ranges and digest not in blobs and all(part in blobs for part in ranges)}
        present = sum(member.length for member in set(blobs.values()))
        claimed = sum(blob.length for blob in joined.values())
        if claimed > MAX_CLAIMED * present:
            raise ValueError("refused: it claims to hold blobs of %d bytes, and %d are there"
                             % (claimed, present))
        return joined


def folders_with_images(members: Dict[str, Member]) -> Dict[str, Dict[str, Member]]:
    """The folders with images, "" for all of the archive, else with a slash at the end; and of each
    the files below it, by their names there. All below a folder belongs to it, so no folder lies
    below another."""
    tops = {match[1] for match in map(ARCHIVE_ROOT.fullmatch, members) if match}
    folders: Dict[str, Dict[str, Member]] = {}
    top = None
    for name in sorted(tops.union(members)):  # a folder comes right before what lies below it
        if top is not None and name.startswith(top):
            if name in members:
                folders[top][name[len(top):]] = members[name]
        elif name in tops and not DAMAGED.search(name):
            top = name
            folders[top] = {}
    return folders


class Contents:
    """What tars and directories contain, read by their formats.

    The formats: the OCI image layout, which docker, containerd, podman, skopeo, cosign, hauler and
    zarf write; that of docker save before version 25; skopeo's directories; the image cache of
    Talos; the tree of a registry."""

    def __init__(self) -> None:
        self.blobs: Dict[Digest, Member] = {}
        self.made: Dict[Digest, bytes] = {}            # manifests that docker save left out
        self.names: Dict[str, Dict[str, Digest]] = {}  # by repository, then by tag or digest
        self.unnamed: Set[Tuple[str, Digest]] = set()  # in a registry's tree, without tag or pin
        self.loose: Dict[str, Set[Digest]] = {}        # referrers without a name, by subject
        self.parts = Parts()
        # Several layers may be links to one file, and images may share a config.
        self._read_digest = functools.lru_cache(maxsize=None)(read_digest)
        self._read_diff_ids = functools.lru_cache(maxsize=None)(read_diff_ids)

    def add(self, path: str, members: Dict[str, Member]) -> None:
        """Take in the images of a file or directory. Raises ValueError, Invalid, OSError."""
        folders = folders_with_images(members)
        if not folders:
            advice = "to store it as a file, use tinyreg.py add"
            if "repositories" in members:
                advice = "load it with docker, and save it with a newer one"
            raise ValueError("no images in it: no index.json, no manifest.json, no docker/registry"
                             "/v2; " + advice)
        for top, inner in folders.items():
            folder = top.rstrip("/")
            if not folder and os.path.isdir(path):
                folder = os.path.basename(os.path.abspath(path))
            default = default_name(path if len(folders) == 1 else folder)
            self.add_blobs(inner)
            if "index.json" in inner:
                self._add_layout(inner, default, *[BASE_NAME] * ("zarf.yaml" in members))
            elif "manifest.json" in inner:
                self._add_docker(inner, folder, default)
            else:
                self._add_tree(inner)
                self._add_cache(inner)

    def add_blobs(self, members: Dict[str, Member]) -> None:
        """Take in all files that are named by a digest."""
        for name, member in members.items():
            digest = find_digest_in(name)
            if digest and not name.startswith("tinyreg/"):  # a store has damaged files there
                self.blobs.setdefault(digest, member)

    def _add_name(self, name: str, reference: str, digest: Digest) -> None:
        """Note the tag or digest by which a manifest is known. If two manifests have one tag, the
        later one gets it, as in a registry."""
        if isinstance(reference, Digest):
            reference = reference.tag or digest
        known = self.names.setdefault(name, {}).get(reference, digest)
        if known != digest:
            logger.warning("%s is two images in these archives: %s, and %s, which counts "
                           "because it comes later", image_text(name, reference), known, digest)
        self.names[name][reference] = digest

    def _add_layout(self, members: Dict[str, Member], default: str, *keys: str) -> None:
        """An OCI image layout: whole, with blobs left out, or as a part of a split archive. `keys`
        are annotations that may have an image's name, beside the usual ones."""
        if PARTS in members:
            self.parts.add(members[PARTS], set(map(find_digest_in, members)))
        # A haul for containerd has in index.json only what that understands.
        content = members.get("hauler-index.json", members["index.json"]).read(MAX_INDEX)
        entries = expect(list, load_json(content).get("manifests"))
        # By name, what later entries may be about. cosign writes an image, then its signatures, all
        # without names; hauler gives signatures the name of their image.
        images: Dict[Optional[Tuple[str, str]], Digest] = {}
        for entry in entries:
            media_type, digest = parse_descriptor(entry)[:2]
            if media_type and media_type not in MANIFEST_TYPES:
                continue  # image-spec: a program "MUST ignore" types that it doesn't know
            annotations = expect(dict, entry.get("annotations") or {})
            name = find_entry_name(annotations, default, *keys)
            match = COSIGN_KIND.match(str(annotations.get("kind")))
            kind = COSIGN_KINDS.get(match[1]) if match else None
            if kind == "":
                is_first, images[name] = name not in images, digest
                name = name or (default, "latest" if is_first else digest)
            elif kind:
                subject = annotations.get(HAULER_SUBJECT, images.get(name))
                is_tagged = subject and kind != "@"
                name = (name[0] if name else default,
                        fallback_tag(parse_digest(str(subject))) + kind if is_tagged else digest)
            if name:
                self._add_name(*name, digest)
            elif SUBJECT in annotations:
                self.loose.setdefault(expect(str, annotations[SUBJECT]), set()).add(digest)
            else:
                self._add_name(default, "latest" if len(entries) == 1 else digest, digest)

    def _add_docker(self, members: Dict[str, Member], folder: str, default: str) -> None:
        """What docker save and similar programs write. In a directory of skopeo, manifest.json is
        the image's manifest itself."""
        content = members["manifest.json"].read(MAX_INDEX)
        if not content.lstrip().startswith(b"["):
            digest = Digest.of(content)
            self.blobs[digest] = members["manifest.json"]
            return self._add_name(*folder_image(folder, default), digest)
        # load_json takes only objects.
        images = expect(list, load_json(b'{"images":' + content + b"}")["images"])
        for image in images:
            digest = self._make_manifest(members, expect(dict, image))
            tags = expect(list, image.get("RepoTags") or [])
            for tag in tags:
                self._add_name(*parse_docker_image(expect(str, tag)), digest)
            if not tags:
                self._add_name(default, "latest" if len(images) == 1 else digest, digest)

    def _make_manifest(self, members: Dict[str, Member], image: Dict[str, Any]) -> Digest:
        """Make the OCI manifest that docker save has not written; returns its digest, which is the
        same whenever the image is the same. Raises ValueError, DIGEST_INVALID, OSError."""
        names = [image.get("Config")] + expect(list, image.get("Layers") or [])
        try:
            files = [members[inner_path(expect(str, name))] for name in names]
        except KeyError as error:
            raise ValueError("manifest.json names %s, which is not there" % error)
        diff_ids = [None] + self._read_diff_ids(files[0])
        if len(diff_ids) != len(files):
            diff_ids = [None] * len(files)
        config, *layers = map(self._describe, names, files, diff_ids)
        config["mediaType"] = IMAGE_CONFIGS[0]
        content = to_json({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config,
                           "layers": layers})
        digest = Digest.of(content)
        self.made[digest] = content
        return digest

    def _describe(self, name: str, member: Member, diff_id: Any) -> Dict[str, Any]:
        """The descriptor of a layer of docker save; the layer is added to the blobs.

        Most layers are named by their digest. For others that are not compressed, the image's
        config has the digest (`diff_id`). So most layers are not read now. Whether their digests
        are right shows when they are copied."""
        with member.open() as blob:
            packed = find_compression(blob.read(8))
        digest = find_digest_in(name)
        if not digest:
            is_told = diff_id and not packed
            digest = parse_digest(expect(str, diff_id)) if is_told else self._read_digest(member)
        self.blobs.setdefault(digest, member)
        media_type = "application/vnd.oci.image.layer.v1.tar" + ("+" + packed if packed else "")
        return {"mediaType": media_type, "digest": digest, "size": member.length}

    def _add_tree(self, members: Dict[str, Member]) -> None:
        """The tree of a registry: that of Distribution, which is ours as well."""
        for path, member in members.items():
            match = TREE_LINK.fullmatch(path)
            target = member.read().decode("ascii", "replace") if match else ""
            if match and DIGEST.fullmatch(target):
                name, tag = match.groups()
                digest = Digest(target)
                self._add_name(name, tag or digest, digest)
                pin = "tinyreg/pinned/%s/_digests/%s" % (name, target.replace(":", "/"))
                if not tag and pin not in members:
                    self.unnamed.add((name, digest))

    def _add_cache(self, members: Dict[str, Member]) -> None:
        """The image cache of Talos, in its flat layout."""
        for path, member in members.items():
            match = CACHE_ENTRY.fullmatch(path)
            if match:
                host, name, tag = match.groups()
                digest = Digest.of(member.read())
                self.blobs.setdefault(digest, member)
                self._add_name(origin_name(canonical_host(host), name),
                               parse_tag(tag) if tag else digest, digest)


# An archive as a registry


class Mentions(NamedTuple):
    """The digests that a manifest mentions: an archive keeps them, not the manifest."""

    inner: Set[Digest]    # its children; also its referrers, if they have no name
    content: Set[Digest]  # all blobs and manifests that it consists of
    subject: Optional[str]


class Reach(NamedTuple):
    """What the names of a repository lead to."""

    manifests: Set[Digest]
    content: Set[Digest]  # all blobs and manifests that these consist of, and they themselves
    inner: Set[Digest]    # manifests that are children or referrers of others
    referrers: Dict[str, Set[Digest]]  # by subject


class Archive(Contents, Registry):
    """Tars and directories with images, as one registry that can only be read.

    With `scratch`, a folder, tars may be compressed, and `-` is stdin. `ranges` is a folder with
    the ranges of blobs that came in earlier parts. With `partly`, tars that can't be read are
    passed over, as long as one can be read; `unreadable` says why. Raises UNSUPPORTED, OSError."""

    def __init__(self, paths: Sequence[str], scratch: str = "", ranges: str = "",
                 partly: bool = False) -> None:
        super().__init__()
        self.root = self.title = ", ".join(paths)
        self.unreadable: Dict[str, str] = {}   # what is wrong, by path
        self.damaged: Dict[Digest, str] = {}   # the file with a damaged blob or range
        self._reach = functools.lru_cache(MAX_REACHES)(self._follow)
        # A hundred thousand names may lead to one large manifest.
        self._mentions = functools.lru_cache(maxsize=None)(self._read_mentions)
        try:
            for path in paths:
                self._take_in(path, scratch, partly)
            if self.unreadable and not self.blobs:
                path = min(self.unreadable)
                raise ValueError(self.unreadable[path])
            path = self.root
            if ranges:
                self.add_blobs(read_folder(ranges))
            self.joined = self.parts.join(self.blobs)
        except (ValueError, Invalid) as error:
            raise RegistryError("UNSUPPORTED", message="%s: %s" % (path, error))

    def _take_in(self, path: str, scratch: str, partly: bool) -> None:
        """Add the images of a file or directory. Raises ValueError, Invalid, OSError."""
        members: Dict[str, Member] = {}
        try:
            if os.path.isdir(path):
                members = read_folder(path)
            else:
                read_tar(path, open_tar(path, scratch), members)
        except ValueError as error:
            if not partly:
                raise
            self.unreadable[path] = str(error)
            if PARTS not in members:  # it comes after all manifests: else one may be cut off
                return
        self.add(path, members)

    # What names lead to

    def _read_manifest(self, digest: Digest) -> Manifest:
        """Raises MANIFEST_UNKNOWN, and DIGEST_INVALID for a damaged one."""
        content = self.made.get(digest)
        if content is None and digest not in self.blobs:
            raise RegistryError("MANIFEST_UNKNOWN", digest)
        try:
            return parse_manifest(content or self.blobs[digest].read(), digest=digest)
        except (ValueError, Invalid):
            if content is None and self.blobs[digest].length <= MAX_MANIFEST:
                self.find_damage(digest)
            raise RegistryError("DIGEST_INVALID", digest, status=404,
                                message="a manifest is damaged in the archive")

    def _find_manifest(self, digest: Digest) -> Optional[Manifest]:
        """None for a manifest that is missing or damaged."""
        # --platform leaves children out on purpose. Whatever else is wrong, a copy will say so.
        with contextlib.suppress(Unknown, DigestInvalid):
            return self._read_manifest(digest)
        return None

    def _read_mentions(self, digest: Digest) -> Optional[Mentions]:
        manifest = self._find_manifest(digest)
        if not manifest:
            return None
        inner = {child.digest for child in manifest.manifests if child.media_type in MANIFEST_TYPES}
        return Mentions(inner | self.loose.get(digest, set()),
                        {part.digest for part in manifest.blobs + manifest.manifests},
                        manifest.subject)

    def _follow(self, roots: FrozenSet[Digest]) -> Reach:
        reach = Reach(set(), set(), set(), {})
        queue = list(roots)
        for digest in queue:  # it grows
            mentions = None if digest in reach.manifests else self._mentions(digest)
            reach.manifests.add(digest)
            if mentions:
                queue.extend(mentions.inner)
                reach.inner.update(mentions.inner)
                reach.content.update(mentions.content)
                if mentions.subject:
                    reach.referrers.setdefault(mentions.subject, set()).add(digest)
        reach.content.update(reach.manifests)
        reach.inner.update(*[reach.referrers[subject] for subject
                             in reach.referrers.keys() & reach.manifests])
        return reach

    def _names_in(self, name: str) -> Dict[str, Digest]:
        """The tags and digests by which a repository's manifests are known. Raises NAME_UNKNOWN."""
        if name not in self.names:
            raise RegistryError("NAME_UNKNOWN", name)
        return self.names[name]

    def _reach_of(self, name: str) -> Reach:
        """Raises NAME_UNKNOWN."""
        return self._reach(frozenset(self._names_in(name).values()))

    # Reader

    def repositories(self, last: str = "") -> Iterator[str]:
        return (name for name in sorted(self.names) if name > last)

    def has_repository(self, name: str) -> bool:
        return name in self.names

    def tags(self, name: str, last: str = "") -> Iterator[str]:
        return (tag for tag in sorted(self._names_in(name))
                if tag > last and not isinstance(tag, Digest))

    def resolve(self, name: str, tag: str) -> Digest:
        digest = self._names_in(name).get(tag)
        if not digest:
            raise RegistryError("MANIFEST_UNKNOWN", tag)
        return digest

    def manifest(self, name: str, digest: Digest) -> Manifest:
        if digest not in self._reach_of(name).manifests:
            raise RegistryError("MANIFEST_UNKNOWN", digest)
        return self._read_manifest(digest)

    def open_blob(self, name: str, digest: Digest, offset: int = 0) -> Blob:
        blob = self.joined.get(digest) or self.blobs.get(digest)
        if digest not in self._reach_of(name).content or not blob:
            raise RegistryError("BLOB_UNKNOWN", digest)
        return blob.open().rest(offset)

    def referrers(self, name: str, subject: Digest, last: str = "") -> Iterator[Manifest]:
        if name in self.names:
            for digest in sorted(self._reach_of(name).referrers.get(subject, ())):
                if digest > last:
                    yield self._read_manifest(digest)

    def manifests(self, name: str) -> Iterator[Manifest]:
        return filter(None, map(self._find_manifest, self._reach_of(name).manifests))

    def digests(self, name: Optional[str] = None) -> Iterator[Digest]:
        present = set(self.blobs).union(self.joined, self.made)
        present.difference_update(*self.parts.ranges.values())
        return iter(sorted(present if name is None else present & self._reach_of(name).content))

    def is_named(self, name: str, digest: Digest) -> bool:
        return (name, digest) not in self.unnamed

    def version(self) -> bytes:
        return b"an archive does not change"

    # What the commands ask of archives

    def holds(self, name: str, reference: Reference) -> bool:
        """Whether a repository has a tag, or a manifest that its names lead to."""
        names = self.names.get(name, {})
        return reference in names or bool(names) and reference in self._reach_of(name).manifests

    def pinned(self, name: str) -> List[Digest]:
        """The digests of a repository's images without a tag, in order: of manifests that are
        neither a child nor a referrer of another, and have no tag elsewhere in the repository.
        Raises NAME_UNKNOWN."""
        references = self._names_in(name).items()
        tagged = {digest for reference, digest in references if reference != digest}
        # The others are under a tag, or with another image.
        return sorted({digest for _, digest in references} - tagged - self._reach_of(name).inner)

    def images(self) -> Iterator[Tuple[str, str, Digest]]:
        """Yield the repository, the tag or digest, and the digest of each image."""
        for name, references in sorted(self.names.items()):
            pinned = set(self.pinned(name))
            for reference, digest in sorted(references.items()):
                if reference != digest or digest in pinned:
                    yield name, reference, digest

    def lacking(self) -> Set[Digest]:
        """The blobs, and the manifests that have names, that images need and that are not here.
        Each manifest is read for it, once."""
        roots = frozenset().union(*(references.values() for references in self.names.values()))
        needed = set(roots)
        for manifest in filter(None, map(self._find_manifest, self._follow(roots).manifests)):
            needed.update(blob.digest for blob in manifest.blobs if not blob.foreign)
        return needed.difference(self.digests())

    def find_damage(self, digest: Digest) -> bool:
        """Whether a blob, or a range of it, is damaged; `damaged` then says in which file."""
        pieces = self.parts.ranges[digest] if digest in self.joined else [digest]
        for piece in pieces:
            member = self.blobs.get(piece)
            if member and read_digest(member, piece.algorithm) != piece:
                self.damaged[piece] = member.path
        return not self.damaged.keys().isdisjoint(pieces)

    def needed_parts(self, digest: Digest, keeps_ranges: bool = True) -> Set[Part]:
        """The parts that have what a blob lacks. A target that keeps no ranges needs all parts of a
        blob that was cut."""
        pieces = self.parts.ranges.get(digest)
        if not pieces or keeps_ranges:
            pieces = [piece for piece in pieces or [digest]
                      if piece not in self.blobs or piece in self.damaged]
        return set().union(*(self.parts.holders.get(piece, ()) for piece in pieces))


# Writing archives

def blob_name(digest: Digest) -> str:
    return "blobs/%s/%s" % (digest.algorithm, digest.encoded)


def check_hash(hasher: Any, digest: Digest, what: str = "blob") -> None:
    """Raises DIGEST_INVALID unless what was hashed has this digest."""
    if hasher.hexdigest() != digest.encoded:
        raise RegistryError("DIGEST_INVALID", digest, message="a %s is damaged" % what)


def tar_header(name: str, length: int, kind: bytes = b"0") -> bytes:
    """The header of a member, as GNU's tar writes it, but without time and owner. The standard
    library's tarfile is not used, because its headers depend on the version of Python."""
    encoded, before = name.encode("ascii"), b""
    if len(encoded) > 100:
        before = (tar_header("././@LongLink", len(encoded) + 1, b"L")
                  + encoded.ljust(padded(len(encoded) + 1), b"\0"))
    size = b"%011o\0" % length if length < 1 << 33 else (1 << 95 | length).to_bytes(12, "big")
    mode = b"0000755" if name.endswith(".py") else b"0000644"
    header = struct.pack("100s8s8s8s12s12s8ss100s8s247x", encoded[:100], mode, b"0000000",
                         b"0000000", size, b"00000000000", b" " * 8, kind, b"", b"ustar  ")
    return before + header[:148] + b"%06o\0 " % sum(header) + header[156:]


def tar_member(name: str, content: bytes) -> bytes:
    """A small file with its header, in whole blocks."""
    return tar_header(name, len(content)) + content.ljust(padded(len(content)), b"\0")


def find_subject(manifest: Manifest, reference: str) -> Optional[str]:
    """The digest of the manifest that this one is about. cosign has it in the tag, which is too
    short for a sha512."""
    match = FALLBACK_TAG.fullmatch(reference)
    if manifest.subject or not match or match[1] != "sha256":
        return manifest.subject
    return "%s:%s" % match.groups()


def is_runnable(manifest: Manifest) -> bool:
    """Whether docker load can make an image of it: no index, no artifact, no signature."""
    if manifest.media_type not in IMAGE_TYPES or manifest.subject or not manifest.blobs:
        return False
    config, *layers = [blob.media_type for blob in manifest.blobs]
    return config in IMAGE_CONFIGS and all(map(LAYER_TYPES.match, layers))


def open_part(path: str) -> BinaryIO:
    """A new file beside `path`, which is locked until it is closed. Raises OSError."""
    while True:
        file = open("%s.%s.part" % (path, uuid.uuid4().hex[:8]), "xb")
        with contextlib.suppress(OSError):  # without locks, remove_parts() leaves all as it is
            fcntl.flock(file, fcntl.LOCK_EX)
        if is_at(file, file.name):
            return file
        file.close()  # remove_parts() was faster


def remove_parts(path: str) -> None:
    """Delete what open_part() has made for this path, or for parts of it, and a process that is
    gone has left. Raises OSError."""
    folder, name = os.path.split(os.path.realpath(path))
    pattern = r"%s(?:-\d+of\d+)?%s\.[0-9a-f]{8}\.part" % tuple(
        map(re.escape, os.path.splitext(name)))
    for part in filter(re.compile(pattern).fullmatch, list_directory(folder)):
        # It is locked, because it is being written; or it is gone.
        with contextlib.suppress(OSError), open(os.path.join(folder, part), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(file.name)


class PlannedBlob(NamedTuple):
    """A blob of an archive that is to be written: `length` bytes from `start` on."""

    length: int
    open_from: Callable[[int], Blob]
    start: int = 0


class PlannedFile(NamedTuple):
    """A file that is to be written."""

    path: str
    digests: List[Digest]  # of the blobs in it; it also has all manifests


class ArchiveWriter(Registry):
    """What is copied here is noted, and written at the end. So the tar begins with its index, and
    the same images make the same bytes. Blobs in `have` are left out: the far side has them."""

    def __init__(self, have: Iterable[Digest] = ()) -> None:
        self.have = set(have)
        self.left_out: Set[Digest] = set()  # those of them that images here need
        self.blobs: Dict[Digest, PlannedBlob] = {}
        self.manifest_by_digest: Dict[Digest, Manifest] = {}
        self.images: Set[Tuple[str, str, Digest]] = set()  # repository; tag or digest; digest
        self.files: List[PlannedFile] = []
        self.parts: List[PlannedFile] = []            # the same, if these are parts
        self.joined: Dict[Digest, List[Digest]] = {}  # the ranges of the blobs that are cut
        self.program: Optional[bytes] = None          # tinyreg.py, to travel along

    def mount(self, name: str, digest: Digest, source: Optional[str] = None) -> bool:
        if digest in self.have and digest not in self.blobs:
            self.left_out.add(digest)
        return digest in self.have or digest in self.blobs

    def put_blob(self, name: str, digest: Digest, open_from: Callable[[int], Blob]) -> None:
        with open_from(0) as blob:
            self.blobs[digest] = PlannedBlob(blob.length, open_from)

    def put_manifest(self, name: str, manifest: Manifest, tags: Iterable[str] = (),
                     check_wanted: Callable[[], None] = do_nothing) -> None:
        self.manifest_by_digest[manifest.digest] = manifest
        self.images.update((name, tag, manifest.digest) for tag in tags or [manifest.digest])

    # The small files

    def _index_entry(self, name: str, reference: str, digest: Digest) -> Dict[str, Any]:
        """The entry of index.json for an image.

        containerd and docker make no image of an entry with SUBJECT. But older versions try to
        unpack it if it has IMAGE_NAME or REF_NAME, and fail. So a signature of cosign's has only
        OWN_NAME, from which load knows its tag."""
        manifest, annotations = self.manifest_by_digest[digest], {}
        subject = find_subject(manifest, reference)
        if subject:
            annotations[SUBJECT] = subject
        if not (manifest.subject and isinstance(reference, Digest)):
            annotations[OWN_NAME] = image_text(name, reference)
        if not subject:
            annotations[IMAGE_NAME] = annotations[REF_NAME] = image_text(full_name(name), reference)
        return {"mediaType": manifest.media_type, "digest": digest, "size": len(manifest.content),
                "annotations": annotations}

    def _make_index(self) -> bytes:
        """The content of index.json: an entry for each name, and for each referrer."""
        children = {child.digest for manifest in self.manifest_by_digest.values()
                    for child in manifest.manifests}
        entries = [self._index_entry(name, reference, digest)
                   for name, reference, digest in sorted(self.images)
                   if digest not in children or not isinstance(reference, Digest)]
        return to_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})

    def _docker_images(self, digests: Iterable[Digest]) -> List[Dict[str, Any]]:
        """The entries of manifest.json: the images that docker load can take from a file with these
        blobs. They have one platform each."""
        images: Dict[Digest, Dict[str, Any]] = {}
        present = set(self.manifest_by_digest).union(digests)
        for name, reference, digest in sorted(self.images):
            # The image itself; of an index, the first image in it that can run.
            reachable = walk([digest], self.manifest_by_digest.get, child_digests)
            image = next(filter(is_runnable, reachable), None)
            if (image and not isinstance(reference, Digest)
                    and present.issuperset(blob.digest for blob in image.blobs)):
                config, *layers = [blob_name(blob.digest) for blob in image.blobs]
                entry = images.setdefault(digest, {"Config": config, "RepoTags": [],
                                                   "Layers": layers})
                entry["RepoTags"].append(image_text(full_name(name), reference))
        return list(images.values())

    def _make_table(self) -> bytes:
        """The content of PARTS: see Parts."""
        return to_json({"files": [os.path.basename(part.path) for part in self.parts],
                        "joined": self.joined, "holds": [part.digests for part in self.parts],
                        "left_out": sorted(self.left_out)})

    def _small_files(self, digests: Iterable[Digest]) -> Iterator[Tuple[str, bytes]]:
        """Yield the name and the content of each file with which a tar with these blobs begins."""
        if self.program:
            yield "tinyreg.py", self.program
        yield "oci-layout", b'{"imageLayoutVersion":"1.0.0"}'
        yield "index.json", self._make_index()
        images = self._docker_images(digests)
        if images:
            yield "manifest.json", to_json(images)
        for digest, manifest in sorted(self.manifest_by_digest.items()):
            yield blob_name(digest), manifest.content
        if self.left_out or self.parts:
            yield PARTS, self._make_table()

    # What goes into which file

    def _blob_size(self, digest: Digest) -> int:
        """The bytes that a blob takes in a tar."""
        length = self.blobs[digest].length
        return len(tar_header(blob_name(digest), length)) + padded(length)

    def size(self, digests: Sequence[Digest]) -> int:
        """The bytes of a tar with these blobs."""
        small = sum(len(tar_member(*file)) for file in self._small_files(digests))
        return small + sum(map(self._blob_size, digests)) + len(TAR_END)

    def plan(self, path: str = "", program: Optional[bytes] = None,
             limit: Optional[int] = None) -> None:
        """Decide what goes into which of the `files`: one at `path`, or, if it would have more than
        `limit` bytes, several beside it. Raises SIZE_INVALID if the limit is too small,
        DIGEST_INVALID, OSError."""
        self.program = program
        digests = sorted(self.blobs.keys() - self.manifest_by_digest.keys())
        self.files = [PlannedFile(path, digests)]
        if limit and self.size(digests) > limit:
            self._split(path, digests, limit)

    def _split(self, path: str, digests: List[Digest], limit: int) -> None:
        """Plan parts. All of them have all manifests, so that each can be loaded by itself. A blob
        that is larger than a part is cut into ranges, which are blobs of their own."""
        size = self.size(digests)
        least = size - sum(map(self._blob_size, digests))
        # The bytes that PARTS may take. It lists all blobs, and for each part a name, of which
        # each character may take six bytes, and the ranges in it.
        table = 2000 * (2 + size // max(limit - least, 1)) + sum(len(key) + 3 for key in digests)
        room = limit - least - table
        if room < table:
            raise RegistryError("SIZE_INVALID", message="a part has to be larger: what all parts "
                                "have takes %d bytes: the manifests, and tinyreg.py, unless it is "
                                "left out (--no-self)" % least)
        self.joined = {digest: self._cut(digest, room - 2 * BLOCK)
                       for digest in digests if self._blob_size(digest) > room}
        pieces = [piece for digest in digests for piece in self.joined.get(digest, [digest])]
        parts = self._pack(dict.fromkeys(pieces), room)
        stem, extension = os.path.splitext(path)
        # It may be a single one, if all ranges of a blob are the same.
        self.files = self.parts = [
            PlannedFile("%s-%dof%d%s" % (stem, number, len(parts), extension), part)
            for number, part in enumerate(parts, 1)]

    def _cut(self, digest: Digest, step: int) -> List[Digest]:
        """Make a blob of each range of a blob; returns their digests. Raises DIGEST_INVALID,
        OSError."""
        length, open_from, _ = self.blobs[digest]
        whole, ranges = hashlib.new(digest.algorithm), []
        with open_from(0) as blob:
            for start in range(0, length, step):
                size, hasher = min(step, length - start), hashlib.sha256()
                copy_bytes(blob, size, hasher.update, whole.update)
                ranges.append(Digest("sha256:" + hasher.hexdigest()))
                self.blobs[ranges[-1]] = PlannedBlob(size, open_from, start)
        check_hash(whole, digest)
        return ranges

    def _pack(self, digests: Iterable[Digest], room: int) -> List[List[Digest]]:
        """Share blobs, in their order, among parts with room for so many bytes."""
        parts: List[List[Digest]] = []
        left = 0
        for digest in digests:
            if self._blob_size(digest) > left:
                parts.append([])
                left = room
            parts[-1].append(digest)
            left -= self._blob_size(digest)
        return parts

    # Writing

    def write(self, digests: Sequence[Digest], take: Callable[[Any], Any]) -> None:
        """Hand a tar with these blobs to a function, such as a file's write. Blobs are checked on
        their way. Raises DIGEST_INVALID, OSError."""
        for file in self._small_files(digests):
            take(tar_member(*file))
        for digest in digests:
            (length, open_from, start), hasher = self.blobs[digest], hashlib.new(digest.algorithm)
            take(tar_header(blob_name(digest), length))
            with open_from(start) as blob:
                copy_bytes(blob, length, hasher.update, take)
            check_hash(hasher, digest)
            take(bytes(padded(length) - length))
        take(TAR_END)

    def _save_file(self, path: str, digests: Sequence[Digest],
                   note: Callable[[int], Any]) -> str:
        """Write a file; returns its sha256. It gets its name when it is safe on the disk; a link
        with this name stays."""
        hasher, path = hashlib.sha256(), os.path.realpath(path)

        def take(content: bytes) -> None:
            file.write(content)
            hasher.update(content)
            note(len(content))

        with open_part(path) as file, deleted_on_error(file.name):
            self.write(digests, take)
            file.flush()
            sync(file.fileno())
            os.rename(file.name, path)
        sync_path(os.path.dirname(path))
        return hasher.hexdigest()

    def save(self, note: Callable[[int], Any] = do_nothing) -> List[str]:
        """Write the files; returns the sha256 of each. Calls `note` with the number of bytes that
        are written. Raises DIGEST_INVALID, OSError."""
        return [self._save_file(path, digests, note) for path, digests in self.files]

# -------------------------------------------------------------------------------------------------
# 10  Remote
#
# The client side of the protocol: another registry over HTTP, with its logins, redirects, retries,
# and transfers that go on where they were cut. What goes wrong becomes a RegistryError whose one
# line says what to do. PullThrough puts a store in front of other registries. This room opens no
# server sockets. The next room decides which images are copied, and in which order.
# -------------------------------------------------------------------------------------------------

ACCEPT = {"Accept": ", ".join(MANIFEST_TYPES)}
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
MAX_ANSWER = 2 * MAX_MANIFEST  # bytes of a body that is no blob; some list all tags in one page
MAX_MESSAGE = 1000           # characters of another registry's error message that are passed on
MAX_REFUSAL = 1 << 20        # bytes of the body of a refusal, which may say why …
REFUSAL_LIMIT = 5.0          # … and the seconds that we wait for it
MAX_PAGES = 1000             # pages of a list of tags or referrers …
MAX_TAG_PAGES = 10           # … those of a list of tags that is read to save other requests …
MAX_LIST = 64 << 20          # … their bytes, and the memory for their entries …
LIST_LIMIT = 300.0           # … and seconds for all of them: a broken registry's list never ends
CONNECT_TIMEOUT = 15.0       # seconds to reach another registry
REMOTE_TIMEOUT = 60.0        # seconds to wait for its bytes, as MovingStream counts them …
TOKEN_TIMEOUT = 20.0         # … and for those of its token server
CLOSING_TIMEOUT = 600.0      # seconds at an upload's end: a large blob is read again and stored
MAX_TOKEN = 64 << 10         # characters of one token …
MAX_TOKENS = 1000            # … and tokens that are kept: clients of a cache may make up any name
SHORT_LIFE = 60              # seconds that a token lives if its server does not say
MAX_IDLE = 16                # hosts whose connections are kept, and kept connections of each
LONGEST_WAIT = 300.0         # seconds; a longer Retry-After means "come back another day"
UPLOAD_CHUNK = 64 << 20      # bytes; what a dropped connection costs if only whole chunks are kept
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)  # the last for odd host names
REFUSALS = (Unknown, Invalid, Refused, Unsupported)  # a registry was reached, and says no
MAX_HOPS = 8                 # caches that pass on one request; a request that goes in circles ends

# How a cache names itself in Via, so that no request comes back to it. All workers have one name.
HOP = re.compile("1\\.1 tinyreg-[0-9a-f]{16}")
THIS_HOP = "1.1 tinyreg-" + os.urandom(8).hex()

CHALLENGE = re.compile(r'(?:^|,)\s*(Basic|Bearer)\b'
                       r'((?:[\s,]*\w+\s*=\s*(?:"(?:\\.|[^"\\])*"|[^\s,"]+))*)', re.I)
PARAMETER = re.compile(r'\b(\w+)\s*=\s*(?:"((?:\\.|[^"\\])*)"|([^\s,"]+))')
NEXT_LINK = re.compile(r'<([^<>]*)>\s*;[^,<]*rel="?next"?')

Challenges = Dict[str, Dict[str, str]]  # {scheme: {parameter: value}}


class Hops(threading.local):
    """The caches that have passed on the request which this thread answers; None if it answers
    none."""

    passed: Optional[List[str]] = None


HOPS = Hops()


class TemporaryFailure(Unavailable):
    """A failure after which the same request may succeed. `wait` is how many seconds the registry
    wants to be left alone, None if it does not say."""

    wait: Optional[float] = None


# Logins


def basic_authorization(user: str, secret: str) -> str:
    """The Authorization header of RFC 7617."""
    return "Basic " + base64.b64encode(("%s:%s" % (user, secret)).encode()).decode()


class Login(NamedTuple):
    """What a registry or its token server wants to see. `source` is the file or program that has
    it, for messages."""

    user: str
    secret: str
    identity_token: Optional[str]  # docker's: it is exchanged for other tokens
    source: str

    @property
    def authorization(self) -> str:
        """The Authorization header with user and secret."""
        return basic_authorization(self.user, self.secret)


def login_files() -> List[str]:
    """Where docker, podman and skopeo keep their logins, in the order in which we look."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    docker = os.environ.get("DOCKER_CONFIG") or "~/.docker"
    paths = [os.environ.get("REGISTRY_AUTH_FILE"),
             runtime and runtime + "/containers/auth.json",
             "~/.config/containers/auth.json",
             docker + "/config.json"]
    return [os.path.expanduser(path) for path in paths if path]


def login_key(key: str) -> str:
    """The key of a login, which is a host or a host with a path, as we compare it. Docker writes
    docker.io as https://index.docker.io/v1/."""
    _, scheme, url = key.rpartition("://")
    return canonical_host(url.partition("/")[0] if scheme else re.sub("/v[12]/?$", "", key))


def server_key(host: str) -> str:
    """The key under which docker writes the login of a host, and asks a helper for it."""
    return "https://index.docker.io/v1/" if host == "docker.io" else host


def parse_login(entry: Dict[str, Any], file: str) -> Optional[Login]:
    """The Login in one entry of a file; None where it is empty, as docker leaves it if a helper has
    the login. Raises ValueError."""
    user, _, secret = base64.b64decode(entry.get("auth", "")).decode().partition(":")
    token = entry.get("identitytoken")
    return Login(user, secret.rstrip("\0"), token, file) if secret or token else None


def ask_helper(helper: str, host: str) -> Optional[Login]:
    """The Login that a credential helper of docker has for a host. None also if the helper fails or
    is not installed: another file may have a login."""
    program = "docker-credential-" + helper
    try:
        done = subprocess.run([program, "get"], input=server_key(host).encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=REMOTE_TIMEOUT, check=True)
        answer = load_json(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        return None  # as if it had no login
    return Login(user, secret, secret if user == "<token>" else None, program)


class LoginFile:
    """A file in which docker, podman and skopeo keep logins; it need not be there. Raises OSError;
    CommandError where it is damaged."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.document = load_json(read_file(path) or b"{}")
            self.entries, self.helpers = (
                {login_key(key): value
                 for key, value in dict(self.document.get(field) or {}).items()}
                for field in ("auths", "credHelpers"))
        except (ValueError, TypeError) as error:
            raise CommandError("%s is damaged: %s; mend it, or move it away" % (path, error))

    def helper(self, host: str) -> str:
        """The credential helper that it names for this host; "" without."""
        return self.helpers.get(host) or self.document.get("credsStore") or ""

    def find(self, keys: Sequence[str]) -> Optional[Login]:
        """The Login that it, or the helper that it names, has for the first of these keys that has
        one. The last key is the host alone. Raises ValueError, TypeError or AttributeError for a
        damaged entry."""
        helper = self.helper(keys[-1])
        login = ask_helper(helper, keys[-1]) if helper else None
        for key in keys:
            login = login or parse_login(self.entries.get(key) or {}, self.path)
        return login


def find_login(host: str, path: str = "") -> Optional[Login]:
    """The Login for a repository. A key may name a part of its path; the longest one counts."""
    keys = list(itertools.accumulate([host] + path.split("/"), os.path.join))[::-1]
    for file in login_files():
        try:
            login = LoginFile(file).find(keys)
            if login:
                return login
        except (OSError, CommandError, ValueError, TypeError, AttributeError) as error:
            logger.warning("no logins read from %s: %s", file, error)
    return None


def choose_login_file(host: str) -> str:
    """The file that a login for this host belongs into. The first that has one hides the others;
    else it is docker's, or the one that there is. Raises OSError, CommandError."""
    files = login_files()
    if os.environ.get("REGISTRY_AUTH_FILE"):
        return files[0]
    present = [file for file in files if os.path.exists(file)]
    having = [file for file in present if host in LoginFile(file).entries]
    return (having + present[::-1] + files[-1:])[0]


def replace_login(file: str, host: str, login: Optional[Login]) -> None:
    """Write the login of a host into a file as docker does, or remove it if it is None. All else in
    the file stays. Raises OSError, CommandError."""
    path = os.path.realpath(file)
    make_directories(os.path.dirname(path))
    with alone(path + ".lock"):
        document = LoginFile(path).document
        entries = {key: entry for key, entry in (document.get("auths") or {}).items()
                   if login_key(key) != host}
        if login:
            entries[server_key(host)] = {"auth": login.authorization.partition(" ")[2]}
        document["auths"] = entries
        if os.path.exists(path):
            os.chmod(path, 0o600)  # the file that replaces it has the same mode
        content = json.dumps(document, indent="\t").encode()
        Files(os.path.dirname(path)).write(path, content, private=True)


# Connections


class ClientRequest(NamedTuple):
    """A request to another registry, to its token server, or to where one of these redirects."""

    method: str
    url: str
    headers: Dict[str, str] = {}
    body: Union[None, bytes, Iterator[bytes]] = None
    authorization: Optional[str] = None
    is_streamed: bool = False  # the body of the reply is a blob: the caller reads and closes it
    timeout: Optional[float] = None  # seconds; else REMOTE_TIMEOUT

    @property
    def origin(self) -> Tuple[str, str]:
        """The scheme and the HOST[:PORT] of the URL."""
        return urllib.parse.urlsplit(self.url)[:2]

    @property
    def is_repeatable(self) -> bool:
        """Whether the request can be sent again; an iterator can't."""
        return self.body is None or isinstance(self.body, bytes)


def add_query(url: str, parameters: Dict[str, Any]) -> str:
    """The URL with more parameters; a list stands for several of the same name."""
    separator = "&" if "?" in url else "?"
    return url + separator + urllib.parse.urlencode(parameters, doseq=True)


class MovingStream(io.RawIOBase):
    """The bytes that a socket receives, as long as they keep moving. In all we wait for them as
    long as the socket's timeout; each KiB that comes earns another second, up to that timeout.
    Otherwise a sender of one byte now and then could keep a thread for days."""

    def __init__(self, raw: Any, sock: socket.socket) -> None:
        self.raw = raw
        self.sock = sock
        self.limit = sock.gettimeout() or REMOTE_TIMEOUT  # seconds
        self.left = self.limit

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        """Raises socket.timeout, OSError."""
        if self.left <= 0:
            raise socket.timeout("it sends too slowly")
        self.sock.settimeout(self.left)
        start = time.monotonic()
        count = self.raw.readinto(view)
        earned = count * PACE_WINDOW / PACE_BYTES - (time.monotonic() - start)
        self.left = min(self.left + earned, self.limit)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class Reply(http.client.HTTPResponse):
    """The reply to a request, from `url`, which is where redirects have led. `content` is its body,
    unless that is streamed."""

    content = b""
    let_go: Callable[[bool], None]  # ends the use of the connection; tells if it is of more use

    def __init__(self, sock: socket.socket, *arguments: Any, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self.stream = MovingStream(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self.stream)

    def header(self, name: str) -> str:
        """The value, those of repeated headers joined; "" where there is none."""
        return self.getheader(name, "")

    def read_content(self) -> bool:
        """Read the body into `content`; returns whether it has ended, so that the connection can be
        used again. Raises NETWORK_ERRORS if it is cut, or longer than MAX_ANSWER.

        The body of a refusal only says why, so it may be cut, and what does not come soon is left.
        It may be nothing like what its header promises: Distribution 2 gives a 416 the length of
        the blob."""
        limit = MAX_ANSWER
        try:
            if self.status >= 300:
                self.stream.left, limit = REFUSAL_LIMIT, MAX_REFUSAL
            if self.status != 416:
                self.content = self.read(limit)
            if self.length or not self.isclosed() and not self.will_close:
                raise http.client.IncompleteRead(self.content)
        except NETWORK_ERRORS:
            if self.status < 300:
                raise
            return False
        return not self.will_close


class ClientConnection(http.client.HTTPConnection):
    """A connection for requests."""

    response_class = Reply


def reason_of(error: Exception) -> str:
    """What a failure of the network says of itself, without the number of an OSError."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class ProxyError(OSError):
    """The proxy that the environment names can't be reached, or does not let us through."""


class ConnectionPool:
    """HTTP connections to any host, which are used again. Knows neither registries nor logins."""

    def __init__(self, ca: Optional[str], insecure: bool) -> None:
        self.context = ssl.create_default_context()
        if ca:
            self.context.load_verify_locations(ca)
        if insecure:
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE
        self.idle: Dict[Tuple[str, str], List[ClientConnection]] = {}  # by origin

    def connect(self, scheme: str, netloc: str) -> ClientConnection:
        """A new connection, through the proxy that the environment (HTTPS_PROXY, …) may name.
        Raises ProxyError for the proxy, and OSError for what is behind it."""
        proxy = urllib.request.getproxies().get(scheme)
        parts = urllib.parse.urlsplit("//" + netloc)
        host, port = str(parts.hostname), parts.port or (443 if scheme == "https" else 80)
        if proxy and not urllib.request.proxy_bypass(netloc) and not is_this_machine(netloc):
            connection = self._open_tunnel(proxy, scheme, host, port)
        else:
            connection = ClientConnection(host, port, timeout=CONNECT_TIMEOUT)
            connection.connect()
        if scheme == "https":
            connection.sock = self.context.wrap_socket(connection.sock, server_hostname=host)
        return connection

    @staticmethod
    def _open_tunnel(proxy: str, scheme: str, host: str, port: int) -> ClientConnection:
        """A new connection through a proxy. Raises ProxyError."""
        userinfo, _, address = proxy.rpartition("://")[2].partition("/")[0].rpartition("@")
        user, _, secret = urllib.parse.unquote(userinfo).partition(":")
        login = {"Proxy-Authorization": basic_authorization(user, secret)} if user else {}
        try:
            connection = ClientConnection(address, timeout=CONNECT_TIMEOUT)
            connection.set_tunnel(host, port, login)
            connection.connect()
        except NETWORK_ERRORS as error:
            raise ProxyError("the proxy %s fails (%s); check %s_proxy in the environment, or add "
                             "the host to no_proxy" % (address, reason_of(error), scheme))
        return connection

    def send(self, request: ClientRequest) -> Reply:
        """The reply; its content has been read, unless it is streamed. Raises NETWORK_ERRORS."""
        if len(self.idle) > MAX_IDLE:
            self.idle = {}  # redirects may lead to ever new hosts; connections that go are closed
        idle = self.idle.setdefault(request.origin, [])
        while True:
            try:
                connection, is_kept = idle.pop(), True
            except IndexError:
                connection, is_kept = self.connect(*request.origin), False
            try:
                return self._send_over(connection, request, idle)
            except BaseException as error:  # also an interrupt leaves the connection of no use
                connection.close()
                # The other side may have closed a kept connection: then another one is tried.
                is_closed = isinstance(error, (ConnectionError, ssl.SSLError,
                                               http.client.BadStatusLine))
                if not is_closed or not is_kept or not request.is_repeatable:
                    raise

    @staticmethod
    def _send_over(connection: ClientConnection, request: ClientRequest,
                   idle: List[ClientConnection]) -> Reply:
        """The reply; afterwards the connection is idle, closed or, until let_go(), the reply's."""
        parts = urllib.parse.urlsplit(request.url)
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        headers = dict(request.headers, Host=parts.netloc)
        headers["User-Agent"] = "tinyreg/" + __version__
        if HOPS.passed is not None:
            headers["Via"] = ", ".join(HOPS.passed + [THIS_HOP])
        if request.authorization:
            headers["Authorization"] = request.authorization
        connection.sock.settimeout(request.timeout or REMOTE_TIMEOUT)
        with contextlib.suppress(ConnectionError):
            # A refusal may cut the body of the request short; then it is there to be read.
            connection.request(request.method, path, request.body, headers)
        reply: Any = connection.getresponse()
        reply.url = request.url

        def let_go(is_usable: bool) -> None:
            if is_usable and len(idle) < MAX_IDLE:
                idle.append(connection)
            else:
                connection.close()

        if request.is_streamed and reply.status < 300:
            reply.let_go = let_go
        else:
            let_go(reply.read_content())
        return reply


def network_advice(error: Exception) -> str:
    """What is wrong with the network to a registry, and what to do; "" where nobody knows."""
    text = str(error)
    outdated = re.search("is not yet valid|has expired", text)
    if outdated:
        return "its certificate %s; is the clock of this machine right? It says %s" % (
            outdated[0], local_time(time.time()))
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.rpartition("certificate verify failed")[2].partition("(_ssl")[0]
        return "its certificate is not trusted (%s); name its CA with --ca FILE" % (
            reason.strip(": ")  # Python 3.6 gives none
            or "its CA, its name, or this machine's clock")
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS; if it is meant to speak plain HTTP, add --plain-http"
    if isinstance(error, socket.gaierror):
        return "there is no such host; check the name, and this machine's DNS or /etc/hosts"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; check the port, and whether the registry runs"
    return text if isinstance(error, ProxyError) else ""


def login_error(host: str, login: Optional[Login], status: int = 401) -> RegistryError:
    """The error for a registry that refuses this login; None: it wants one and we have none."""
    if login:
        why = "does not let %s do this, with the login from %s" % (login.user or "us", login.source)
    else:
        why = ("has no such image, or wants a login for it, and there is none in "
               + ", ".join(login_files()))
    return RegistryError("UNAUTHORIZED" if status == 401 else "DENIED",
                         message="%s %s; log in with: tinyreg.py login %s" % (host, why, host))


class HttpClient:
    """HTTP with one registry, and with the hosts to which it leads. Finds out whether the registry
    speaks TLS, follows redirects, and turns failures into RegistryErrors. Sends no login by
    itself."""

    def __init__(self, host: str, ca: Optional[str], insecure: bool, plain_http: bool) -> None:
        self.host = host
        self.is_lenient = insecure or is_this_machine(host)  # as docker is
        self.plain_http = plain_http
        self.pool = ConnectionPool(ca, self.is_lenient and not ca)
        self.scheme = ""  # http or https, after the first connection
        self.login: Optional[Login] = None  # to be used instead of those in the files

    def base(self) -> str:
        """The URL of the registry up to its path. It begins with https, unless --plain-http is
        given; on this machine, and with --insecure, it is http where nobody speaks TLS. Raises
        UNAVAILABLE."""
        netloc = "registry-1.docker.io" if self.host == "docker.io" else self.host
        if not self.scheme:
            scheme = "http" if self.plain_http else "https"
            try:
                self.pool.connect(scheme, netloc).close()
            except NETWORK_ERRORS as error:
                is_silent = isinstance(error, (ssl.SSLError, ConnectionResetError))
                if (not is_silent or "CERTIFICATE" in str(error)
                        or self.plain_http or not self.is_lenient):
                    raise RegistryError("UNAVAILABLE", message=self.describe(error))
                scheme = "http"
            self.scheme = scheme
        return "%s://%s" % (self.scheme, netloc)

    def is_own(self, url: str) -> bool:
        """Whether a URL is one of the registry itself."""
        return url.startswith(self.base() + "/")

    def find_login(self, name: str) -> Optional[Login]:
        """The Login for a repository of this registry."""
        return self.login or find_login(self.host, name)

    def describe(self, error: Exception) -> str:
        """One line about a failure of the network, with what to do."""
        hint = "; if it speaks HTTPS, leave out --plain-http" if self.plain_http else ""
        return "can't reach %s: %s" % (self.host,
                                       network_advice(error) or reason_of(error) + hint)

    def refusal(self, reply: Reply, image: str = "") -> RegistryError:
        """The error for a reply whose status nobody wants, to a question about an image (NAME,
        NAME:TAG or NAME@DIGEST). It is a TemporaryFailure if the status is one of RETRIED."""
        if reply.status in (401, 403):
            login = self.find_login(re.split("[:@]", image)[0])
            return login_error(self.host, login, reply.status)
        code = {404: "NAME_UNKNOWN", 408: "UNAVAILABLE", 429: "TOOMANYREQUESTS",
                501: "UNSUPPORTED"}.get(  # 501: "Not Implemented"
                    reply.status, "UNSUPPORTED" if reply.status < 500 else "UNKNOWN")
        message = reply.reason
        with contextlib.suppress(ValueError, LookupError, TypeError):
            # Many registries answer in HTML, and none says why in the answer to a HEAD.
            entry = load_json(reply.content)["errors"][0]
            if entry["code"] in ERRORS and reply.status < 500 and reply.status not in RETRIED:
                code = entry["code"]
            message = entry["message"] or message
        message = "%s answered %d: %.*s" % (self.host, reply.status, MAX_MESSAGE, message)
        if reply.status == 400 and self.plain_http and code == "UNSUPPORTED":
            message += "; if it speaks HTTPS, leave out --plain-http"
        if reply.status == 404:
            advice = "" if "@" in image else "; check its name" + " and tag" * (":" in image)
            message = "%s has no %s%s" % (self.host, image, advice)
        if reply.status not in RETRIED:
            return RegistryError(code, message=message)
        failure = TemporaryFailure(code, message=message)
        seconds = re.fullmatch("[0-9]{1,9}", reply.header("Retry-After"))
        if seconds:
            failure.wait = float(seconds[0])
        return failure

    def send(self, request: ClientRequest) -> Reply:
        """The reply, after the redirects that it takes; the authorization is not sent to another
        host. Raises TemporaryFailure; UNAVAILABLE for redirects without end."""
        for _ in range(MAX_REDIRECTS):
            try:
                reply = self.pool.send(request)
                target = urllib.parse.urljoin(request.url, reply.header("Location"))
            except NETWORK_ERRORS as error:
                raise TemporaryFailure("UNAVAILABLE", message=self.describe(error))
            if reply.status in RETRIED:
                raise self.refusal(reply)
            if reply.status not in REDIRECTS or request.method not in ("GET", "HEAD"):
                return reply
            former = request
            request = former._replace(url=target)
            if request.origin != former.origin:
                request = request._replace(authorization=None)
        raise RegistryError("UNAVAILABLE", message="%s redirects more than %d times"
                            % (self.host, MAX_REDIRECTS))


# Authorization


def parse_challenges(header: str) -> Challenges:
    """The challenges of a WWW-Authenticate header; schemes and parameters in lower case."""
    return {scheme.lower(): {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain
                             for name, quoted, plain in PARAMETER.findall(parameters)}
            for scheme, parameters in CHALLENGE.findall(header)}


class Token:
    """What authorizes for one scope, if anything does: a header, and when it has to be renewed, in
    time.monotonic(). Of several threads that need it, one asks for it at its turn."""

    header: Optional[str] = None
    ends = 0.0

    def __init__(self) -> None:
        self.turn = threading.Lock()


class Authenticator:
    """Answers the challenges of a registry with the login, if there is one, of the user who runs
    tinyreg: as RFC 7617 (Basic) and the token authentication of Distribution (Bearer) have it.

    Keeps the tokens by scope."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.tokens: Dict[str, Token] = {}
        self.challenges: Challenges = {}  # that a login has answered, without their scopes

    def _log_in(self, scope: str, refused: Optional[str],
                challenges: Challenges) -> Tuple[str, float]:
        """The header and the end of a token for a scope ("": for no repository), other than the
        header that was refused. Raises UNAUTHORIZED, TemporaryFailure."""
        login = self.client.find_login(scope.split(":")[1] if scope else "")
        if "bearer" in challenges:
            request = self._token_request(challenges["bearer"], scope, login)
            answer = {}
            with contextlib.suppress(ValueError):  # no JSON, so no token
                answer = load_json(self.client.send(request).content)
            token = answer.get("token") or answer.get("access_token")
            life = answer.get("expires_in")
            if not isinstance(life, int) or life <= 0:
                life = SHORT_LIFE
            if isinstance(token, str) and len(token) <= MAX_TOKEN:
                return "Bearer " + token, time.monotonic() + life * 0.9
        elif "basic" in challenges and login and login.authorization != refused:
            return login.authorization, float("inf")
        raise login_error(self.client.host, login)

    def _token_request(self, challenge: Dict[str, str], scope: str,
                       login: Optional[Login]) -> ClientRequest:
        """The request to the token server that a Bearer challenge names. Raises UNAVAILABLE if it
        would send a login without TLS."""
        realm = challenge.get("realm", "")
        is_leak = login and realm.startswith("http:") and self.client.base().startswith("https:")
        if is_leak or not re.match("https?://", realm):
            raise RegistryError("UNAVAILABLE", message="%s wants the login sent to %r, without "
                                "TLS; it was not" % (self.client.host, realm))
        scopes = sorted(set(challenge.get("scope", "").split() + scope.split()))
        query: Any = {"service": challenge["service"]} if "service" in challenge else {}
        if login and login.identity_token:
            query.update(scope=" ".join(scopes), grant_type="refresh_token", client_id="tinyreg",
                         refresh_token=login.identity_token)
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            body = urllib.parse.urlencode(query).encode()
            return ClientRequest("POST", realm, headers, body, timeout=TOKEN_TIMEOUT)
        url = add_query(realm, dict(query, scope=scopes))
        authorization = login.authorization if login else None
        return ClientRequest("GET", url, authorization=authorization, timeout=TOKEN_TIMEOUT)

    def find(self, scope: str) -> Optional[str]:
        """The Authorization header for a scope; None until a challenge wants one, which may be that
        for another scope. A token that is about to end is renewed."""
        token = self.tokens.get(scope) or Token()
        if time.monotonic() <= token.ends:
            return token.header
        with contextlib.suppress(RegistryError):  # the registry may want no token for it
            if self.challenges:
                return self.replace(scope, token.header, self.challenges)
        return None

    def replace(self, scope: str, refused: Optional[str], challenges: Challenges) -> str:
        """Another Authorization header in place of one (None: none) that was refused or is about to
        end. Raises UNAUTHORIZED, TemporaryFailure."""
        if len(self.tokens) >= MAX_TOKENS:
            self.tokens = {}
        token = self.tokens.setdefault(scope, Token())
        with token.turn:
            if token.header in (None, refused):  # no other thread was faster
                token.header, token.ends = None, 0.0
                token.header, token.ends = self._log_in(scope, refused, challenges)
                self.challenges = {scheme: dict(parameters, scope="")
                                   for scheme, parameters in challenges.items()}
            return str(token.header)


# Blobs on their way


class RemoteBlob(Blob):
    """The rest of a blob of another registry, from an offset on. If the connection is cut, it
    raises TemporaryFailure: the reader keeps what has come, and asks for the rest by retry()."""

    def __init__(self, client: HttpClient, reply: Reply, offset: int) -> None:
        self.client = client
        self.reply = reply
        # A registry that knows no ranges sends the blob from its start.
        surplus = offset if reply.status == 200 else 0
        length = reply.length
        if length is not None:
            surplus = min(surplus, length)
            length -= surplus
        super().__init__(None, offset, length or 0)  # 0 also where the registry does not say it
        copy_bytes(self, surplus)

    def readinto(self, view: Any) -> int:
        try:
            count = self.reply.readinto(view)
            if not count and self.reply.length:
                raise ConnectionError("the connection was cut")
        except NETWORK_ERRORS as error:
            raise TemporaryFailure("UNAVAILABLE", message=self.client.describe(error))
        return count

    def close(self) -> None:
        is_usable = self.reply.isclosed() and not self.reply.will_close  # all of it was read
        self.reply.close()
        self.reply.let_go(is_usable)


class LimitedBlob(Blob):
    """The rest of a blob of `size` bytes, which `open_from(offset)` opens. Where more comes, it
    raises SIZE_INVALID: an endless blob would fill the disk. An empty rest is not opened, unless
    the whole blob is empty. `count_bytes` is called with the size of each piece that comes, which
    is at most `piece`."""

    def __init__(self, open_from: Callable[[int], Blob], size: int, offset: int,
                 count_bytes: Callable[[int], Any] = do_nothing, piece: int = sys.maxsize) -> None:
        self.piece = piece
        self.left = max(size - offset, 0)
        self.count_bytes = count_bytes
        self.blob = open_from(offset) if self.left or not offset else Blob(None, 0, 0)
        super().__init__(None, 0, self.blob.length)

    def readinto(self, view: Any) -> int:
        count = self.blob.readinto(memoryview(view)[:self.piece])
        self.left -= count
        if self.left < 0:
            raise RegistryError("SIZE_INVALID", message="the source sends more bytes of a blob "
                                                        "than it should have")
        self.count_bytes(count)
        return count

    def close(self) -> None:
        self.blob.close()


def iter_blob(blob: Blob, length: int) -> Iterator[bytes]:
    """Yield the next `length` bytes of a blob, in pieces. Raises RegistryError also where the blob
    can't be read here: an OSError would be taken for one of the connection."""
    buffer = memoryview(bytearray(min(length, COPY_BUFFER)))
    while length:
        try:
            count = blob.readinto(buffer[:length])
        except OSError as error:
            raise RegistryError("UNKNOWN", message="a blob can't be read here: %s" % error)
        if not count:
            raise RegistryError("SIZE_INVALID", message="a blob ended before its end")
        yield bytes(buffer[:count])
        length -= count


# The protocol


class Remote(Registry):
    """Another registry. `host` is the one in an image's name; repositories have the names that the
    registry uses. A failure of the network raises UNAVAILABLE.

    After a temporary failure a request is repeated up to `retries` times, after pauses of at most
    `patience` seconds. `say` is called with a line about each longer pause.

    If it lives for one reading command only, it may keep lists of tags (`keeps_lists`): one tells
    which of the tags that cosign makes are there, which saves several requests an image."""

    is_distant = True

    def __init__(self, host: str, ca: Optional[str] = None, insecure: bool = False,
                 plain_http: bool = False, retries: int = 5,
                 say: Callable[[str], Any] = logger.warning,
                 patience: float = LONGEST_WAIT, keeps_lists: bool = False) -> None:
        self.host = host
        self.retries, self.say, self.patience = retries, say, patience
        self.keeps_lists = keeps_lists
        self.client = HttpClient(host, ca, insecure, plain_http)
        self.tokens = Authenticator(self.client)
        self.known_in: Dict[Digest, str] = {}  # a repository there that has the blob
        self.mounts: Dict[Tuple[str, Digest], str] = {}  # Location of an upload that a mount began
        self.without_referrers: Set[str] = set()  # repositories for which there is no referrers API
        self.lists: Dict[str, Optional[Set[str]]] = {}  # tags made of digests, if they are known
        self.list_locks: Dict[str, threading.Lock] = {}  # one thread asks, and others wait for it
        self.quota_told = threading.Lock()  # held for ever once it is
        self.takes_chunks = True  # until an upload shows otherwise

    def retry(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and call it again, after longer and longer pauses, while its failure is
        temporary. The last failure becomes an ordinary error, so that no caller repeats it all."""
        for attempt in itertools.count():
            try:
                return action(*arguments)
            except TemporaryFailure as error:
                wait = error.wait
                if wait is None:
                    # At random, so that clients that failed together don't come back together.
                    wait = min(0.5 * 2 ** attempt, 30.0) * random.uniform(0.5, 1.0)
                if attempt >= self.retries or wait > self.patience:
                    raise RegistryError(error.code, message=error.message)
                if wait > 1:
                    self.say("%s; waiting %d s" % (error, wait))
            time.sleep(wait)

    def exchange(self, request: ClientRequest, scope: str, statuses: Sequence[int],
                 image: str) -> Reply:
        """The reply to one request, whose URL may be a path. `image` is what messages call it.

        The authorization for the scope is for this registry alone: it goes to no other host that a
        Location or a redirect names. Raises RegistryError for other statuses than these, and
        TemporaryFailure."""
        request = request._replace(url=urllib.parse.urljoin(self.client.base(), request.url))
        is_own = self.client.is_own(request.url)
        header = self.tokens.find(scope) if is_own else None
        reply = self.client.send(request._replace(authorization=header))
        if reply.status == 401 and is_own and self.client.is_own(reply.url):
            challenges = parse_challenges(reply.header("WWW-Authenticate"))
            header = self.tokens.replace(scope, header, challenges)
            if not request.is_repeatable:
                raise TemporaryFailure("UNAVAILABLE", message="the login at %s ended during an "
                                                              "upload" % self.host)
            reply = self.client.send(request._replace(authorization=header))
        self._tell_quota(reply)
        if reply.status not in statuses:
            raise self.client.refusal(reply, image)
        return reply

    def _tell_quota(self, reply: Reply) -> None:
        """Say once that few are left of the pulls that Docker Hub allows in some hours."""
        left = reply.header("RateLimit-Remaining").partition(";")[0]
        if re.fullmatch("1?[0-9]", left) and self.quota_told.acquire(False):
            self.say("%s lets us pull %s more manifests; its limit is %.30s (w is seconds)"
                     % (self.host, left, reply.header("RateLimit-Limit")))

    def try_login(self, login: Login) -> bool:
        """Use this login from now on. Returns whether the registry has asked for it. Raises
        UNAUTHORIZED or DENIED if it is wrong."""
        self.client.login = login
        self.retry(self.exchange, ClientRequest("GET", "/v2/"), "", (200,), "registry")
        return self.tokens.find("") is not None

    def call(self, method: str, name: str, path: str, statuses: Sequence[int] = (200,),
             action: str = "pull", **settings: Any) -> Reply:
        """The reply to a request about a repository, which is repeated where that may help. The
        path begins with /v2/, or is below the repository. The settings are a ClientRequest's.
        Raises RegistryError for other statuses than these."""
        url = path if path.startswith("/v2/") else "/v2/%s%s" % (name, path)
        scope = "repository:%s:%s" % (name, action)
        reference, image = path.rpartition("/")[2], name
        if "/tags/list" not in path:
            image += ("@" if ":" in reference else ":") + reference
        request = ClientRequest(method, url, **settings)
        return self.retry(self.exchange, request, scope, statuses, image)

    # Reading

    def _iter_list(self, name: str, path: str, field: str,
                   max_pages: int = sys.maxsize) -> Iterator[Any]:
        """Yield the entries of a list, which are in a field of each page. A Link header names the
        next page. Raises UNSUPPORTED if there is no list, and UNKNOWN if it does not end."""
        pages: Set[str] = set()
        size, ends = 0, time.monotonic() + LIST_LIMIT
        while path not in pages:
            is_long = len(pages) >= min(max_pages, MAX_PAGES) or size > MAX_LIST
            if is_long or time.monotonic() > ends:
                raise RegistryError("UNKNOWN", message="%s sends a list of the %s of %s that does "
                                                       "not end" % (self.host, field, name))
            pages.add(path)
            reply = self.call("GET", name, path)
            entries = None
            with contextlib.suppress(ValueError):  # no JSON, so no list
                entries = load_json(reply.content).get(field) or []
            if not isinstance(entries, list):
                raise RegistryError("UNSUPPORTED", message="%s answered with no list of %s"
                                                           % (self.host, field))
            size += len(reply.content) + 64 * len(entries)  # a short tag takes so much as a str
            yield from entries
            link = NEXT_LINK.search(reply.header("Link"))
            if link:
                # The host in it is left out: behind a proxy it may be one that we can't reach.
                target = urllib.parse.urlsplit(urllib.parse.urljoin(path, link[1]))
                path = "%s?%s" % (target.path, target.query)

    def tags(self, name: str, last: str = "") -> Iterator[str]:
        tags = map(str, self._iter_list(name, "/tags/list", "tags"))
        return iter(sorted(tag for tag in tags if tag > last))

    def may_have_tag(self, name: str, tag: str) -> bool:
        if not self.keeps_lists:
            return True
        with self.list_locks.setdefault(name, threading.Lock()):
            if name not in self.lists:
                self.lists[name] = self._list_tags_of_digests(name)
        tags = self.lists[name]
        return tags is None or tag in tags

    def _list_tags_of_digests(self, name: str) -> Optional[Set[str]]:
        """The tags that are made of digests; None if there is no list, or only a long one."""
        with contextlib.suppress(RegistryError):  # then each tag is asked for, which says why
            tags = self._iter_list(name, "/tags/list?n=%d" % PAGE_SIZE, "tags", MAX_TAG_PAGES)
            return set(filter(FALLBACK_TAG.fullmatch, map(str, tags)))
        return None

    def resolve(self, name: str, tag: str) -> Digest:
        path = "/manifests/" + tag
        reply = self.call("HEAD", name, path, (200, 405), headers=ACCEPT)
        digest = reply.header("Docker-Content-Digest")
        if DIGEST.fullmatch(digest):
            return Digest(digest)
        return Digest.of(self.call("GET", name, path, headers=ACCEPT).content)

    def manifest(self, name: str, digest: Digest) -> Manifest:
        reply = self.call("GET", name, "/manifests/" + digest, headers=ACCEPT)
        return parse_manifest(reply.content[:MAX_MANIFEST + 1], digest=digest)

    def find_size(self, name: str, digest: Digest) -> Optional[int]:
        """The length of a blob in bytes, 0 if the registry does not say; None where the repository
        does not have the blob."""
        with contextlib.suppress(Unknown):  # that is the answer
            length = self.call("HEAD", name, "/blobs/" + digest).header("Content-Length")
            return int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
        return None

    def open_blob(self, name: str, digest: Digest, offset: int = 0) -> Blob:
        headers = {"Range": "bytes=%d-" % offset} if offset else {}
        reply = self.call("GET", name, "/blobs/" + digest, (200, 206, 416), headers=headers,
                          is_streamed=True)
        if reply.status == 416:
            # Nothing is left; or what we have is wrong, as its digest will show.
            return Blob(None, 0, 0)
        return RemoteBlob(self.client, reply, offset)

    def referrer_digests(self, name: str, subject: Digest) -> List[Digest]:
        """As Reader has it: from the referrers API or, where there is none, from the tag in which
        clients keep them."""
        if name not in self.without_referrers:
            try:
                entries = self._iter_list(name, "/referrers/" + subject, "manifests")
                return [parse_descriptor(entry).digest for entry in entries]
            except Refused:
                pass  # there may be a login next time; the tag wants it, too
            except REFUSALS:
                # A registry without the API says so in any way, even with a web page.
                self.without_referrers.add(name)
        if not self.may_have_tag(name, fallback_tag(subject)):
            return []
        return [parse_descriptor(entry).digest for entry in self._tagged_referrers(name, subject)]

    def _tagged_referrers(self, name: str, subject: Digest) -> List[Any]:
        """The entries of the index that lists the referrers of a manifest where there is no API for
        them (distribution-spec, "Referrers Tag Schema")."""
        with contextlib.suppress(Unknown):  # then the manifest has no referrers
            digest = self.resolve(name, fallback_tag(subject))
            return self.manifest(name, digest).document.get("manifests") or []
        return []

    # Writing

    def _find_target_size(self, name: str, digest: Digest) -> Optional[int]:
        """What find_size() returns. Remembers for mount() that the repository has the blob."""
        size = self.find_size(name, digest)
        if size is not None:
            self.known_in[digest] = name
        return size

    def present_bytes(self, name: str, blob: Descriptor) -> int:
        return self._find_target_size(name, blob.digest) or 0

    def mount(self, name: str, digest: Digest, source: Optional[str] = None) -> bool:
        """As Writer has it; without a source, from a repository that is known to have the blob."""
        source = source or self.known_in.get(digest)
        if source == name or self._find_target_size(name, digest) is not None:
            return True
        if source is None:
            return False
        path = add_query("/blobs/uploads/", {"mount": digest, "from": source})
        try:
            reply = self.call("POST", name, path, (201, 202),
                              "pull,push repository:%s:pull" % source)
        except RegistryError:  # we may not pull there, or it can't mount: an upload does as well
            return False
        if reply.status == 202:  # the registry wants the bytes instead, and has begun an upload
            self.mounts[name, digest] = reply.header("Location")
        return reply.status == 201

    def put_blob(self, name: str, digest: Digest, open_from: Callable[[int], Blob]) -> None:
        upload = RemoteUpload(self, name, self.mounts.pop((name, digest), ""))
        self.retry(upload.put, digest, open_from)
        self.known_in[digest] = name

    def put_manifest(self, name: str, manifest: Manifest, tags: Iterable[str] = (),
                     check_wanted: Callable[[], None] = do_nothing) -> None:
        """As Writer has it. For a referrer the tag that stands in for the referrers API gets an
        entry, unless the registry has that API."""
        for reference in list(tags) or [manifest.digest]:
            if not manifest.subject and self._is_at(name, reference, manifest.digest):
                continue
            reply = self.call("PUT", name, "/manifests/" + reference, (200, 201, 202), "pull,push",
                              headers={"Content-Type": manifest.media_type}, body=manifest.content)
            if manifest.subject and not reply.header("OCI-Subject"):
                self._add_to_tagged_referrers(name, manifest.subject, manifest)

    def _is_at(self, name: str, reference: str, digest: Digest) -> bool:
        """Whether a reference means this manifest already."""
        # This only saves a PUT, which says what is wrong, if anything is.
        with contextlib.suppress(RegistryError):
            return self.resolve(name, reference) == digest
        return False

    def _add_to_tagged_referrers(self, name: str, subject: Digest, manifest: Manifest) -> None:
        entries = self._tagged_referrers(name, subject)
        if manifest.digest not in [entry.get("digest") for entry in entries]:
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX,
                     "manifests": entries + [manifest.referrer()]}
            self.put_manifest(name, parse_manifest(to_json(index)), [fallback_tag(subject)])


class RemoteUpload:
    """A blob on its way to another registry. `location` is the URL for the next request, which the
    last reply named; "" before the first one."""

    def __init__(self, remote: Remote, name: str, location: str) -> None:
        self.remote = remote
        self.name = name
        self.location = location
        self.offset = 0

    def put(self, digest: Digest, open_from: Callable[[int], Blob]) -> None:
        """Send the blob, from where an earlier attempt ended. Raises TemporaryFailure,
        RegistryError, and what `open_from` raises."""
        if not self._resume():
            if self.location and self.remote.find_size(self.name, digest) is not None:
                return  # all of the blob had come, and only the reply that said so was lost
            self.location = ""
            self._request("POST", "/v2/%s/blobs/uploads/" % self.name, (202,))
        with open_from(self.offset) as blob:
            self._append(blob)
        url = add_query(self.location, {"digest": digest})
        reply = self._request("PUT", url, (201, 204, 404), timeout=CLOSING_TIMEOUT)
        # If the request came twice, the session is gone and the blob is there: a 404 is all right.
        if reply.status == 404 and self.remote.find_size(self.name, digest) is None:
            raise self.remote.client.refusal(reply, self.name)

    def _request(self, method: str, url: str, statuses: Sequence[int], **settings: Any) -> Reply:
        """The reply; it may name the next location. Raises RegistryError for other statuses than
        these, and TemporaryFailure."""
        request = ClientRequest(method, url, **settings)
        scope = "repository:%s:pull,push" % self.name
        reply = self.remote.exchange(request, scope, statuses, self.name)
        self.location = reply.header("Location") or self.location or url
        return reply

    def _resume(self) -> bool:
        """Ask for the offset of an upload that has begun. False if none has, or if the registry has
        forgotten it or takes it for broken, as Distribution does after a chunk was cut."""
        self.offset = 0
        if not self.location:
            return False
        reply = self._request("GET", self.location, range(600))
        if reply.status not in (200, 204):
            return False
        match = re.fullmatch("(?:bytes=)?0-([0-9]{1,18})", reply.header("Range"))
        if match and match[1] != "0":
            self.offset = int(match[1]) + 1
        return True

    def _append(self, blob: Blob) -> None:
        """Send the rest of the blob in chunks; a single chunk goes without a range, as docker sends
        it. Raises TemporaryFailure if the registry takes no chunks: the next attempt sends the blob
        whole."""
        end = self.offset + blob.length
        limit = UPLOAD_CHUNK if self.remote.takes_chunks else blob.length
        is_single = self.offset == 0 and end <= limit
        while self.offset < end:
            length = min(end - self.offset, limit)
            headers = {"Content-Type": OCTET_STREAM, "Content-Length": str(length)}
            if not is_single:
                headers["Content-Range"] = "%d-%d" % (self.offset, self.offset + length - 1)
            reply = self._request("PATCH", self.location, range(600), headers=headers,
                                  body=iter_blob(blob, length))
            if reply.status not in (201, 202, 204):
                error = self.remote.client.refusal(reply, self.name)
                if is_single:
                    raise error
                # Google's Artifact Registry takes blobs only whole.
                self.remote.takes_chunks, self.location = False, ""
                raise TemporaryFailure(error.code, message=error.message)
            self.offset += length


# A store in front of other registries


class Upstream(NamedTuple):
    """Another registry behind a store, and what the names of its repositories begin with there."""

    remote: Remote
    prefix: str


class ArrivingBlob(Blob):
    """A blob of `size` bytes that is read while it comes into a store, by this process or another.
    Its last byte is not read before its digest has proved right. The first read calls `begin`,
    which returns the thread that lets it come. Its bytes are in the file `partial` until that ends,
    and in the file `whole` afterwards."""

    def __init__(self, begin: Callable[[], threading.Thread], partial: str, whole: str,
                 size: int) -> None:
        super().__init__(None, 0, size)
        self.begin, self.partial, self.whole, self.size = begin, partial, whole, size
        self.download: Optional[threading.Thread] = None

    def readinto(self, view: Any) -> int:
        """Waits for the next bytes. Raises OSError if the upstream fails."""
        self.download = self.download or self.begin()
        start = self.offset + self.position
        view = view[:self.length - self.position]
        while view:
            has_ended = not self.download.is_alive()
            path, end = self.partial, self.size - 1
            if has_ended:
                path, end = self.whole, self.size
            with contextlib.suppress(FileNotFoundError):  # nothing has come yet, or nothing will
                with open(path, "rb", buffering=0) as file:
                    count = Blob(file, start, end - start).readinto(view)
                if count:
                    self.position += count
                    return count
            if has_ended:
                raise OSError(errno.EIO, "the upstream did not send all of a blob")
            self.download.join(0.01)
        return 0


def denied_below_upstreams(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PullThrough that raises DENIED below the name of an upstream."""
    def call_inner(self: Any, name: str, *arguments: Any) -> Any:
        if self.find_upstream(name)[0]:
            raise RegistryError("DENIED", name, message="what is below this name is another "
                                "registry's, and kept here as it is there; push under another name")
        return method(self, name, *arguments)
    return call_inner


class PullThrough(Wrapper):
    """A store in front of other registries. What a repository below NS/ lacks is fetched from the
    upstream of NS, passed on at once, and kept. The upstream of * is another such cache: it has
    the images of all other origins, under the same names.

    A tag is compared with the upstream's if that was last done `ttl` seconds ago or more. While the
    upstream is away, what is here is served. Pushes below NS/ are refused, because the next
    comparison of a tag would undo them."""

    AWAY = 30.0  # seconds for which an upstream that could not be reached is left alone

    def __init__(self, store: Directory, upstreams: Dict[str, Upstream],
                 ttl: float = 300.0) -> None:
        super().__init__(store)
        self.store = store
        self.upstreams = upstreams
        self.ttl = ttl
        self.ask_again: Dict[Remote, float] = {}  # when, in time.monotonic(), if one is away
        self.downloads: Dict[Tuple[str, Digest], threading.Thread] = {}  # under way, by blob
        self.mutex = threading.Lock()  # of the downloads

    def find_upstream(self, name: str) -> Tuple[Optional[Remote], str]:
        """The registry behind a repository (None: it is ours), and the name that it has there."""
        for space, upstream in self.upstreams.items():
            if name.startswith(space + "/"):
                return upstream.remote, upstream.prefix + name[len(space) + 1:]
        parent = self.upstreams.get("*") if has_origin(name) else None
        return (parent.remote, parent.prefix + name) if parent else (None, name)

    def _ask(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """What a method of the upstream's Remote returns; None if there is no upstream, or if it
        does not have that or refuses to give it. Raises UNAVAILABLE while it is away or fails."""
        remote, path = self.find_upstream(name)
        if not remote:
            return None
        passed = HOPS.passed or []
        if THIS_HOP in passed or len(passed) >= MAX_HOPS:
            logger.warning("upstream of %s: not asked, because the request has come through this "
                           "server before, or through %d others: the --upstream of one of them "
                           "leads in a circle", name, MAX_HOPS)
            return None
        try:
            if time.monotonic() >= self.ask_again.get(remote, 0):
                return method(remote, path, *arguments)
        except Unknown:
            return None
        except RegistryError as error:
            # Why it fails, and with which login, is for our log and not for clients.
            logger.warning("upstream of %s: %s", name, error)
            if not isinstance(error, Unavailable):
                return None
            if error.code != "UNKNOWN":  # a 5xx: it is not away, and may have other images
                self.ask_again[remote] = time.monotonic() + self.AWAY
        raise RegistryError("UNAVAILABLE", message="the registry that %s comes from can't be asked "
                                                   "at present" % name)

    def version(self) -> None:
        """None: a question alone tells whether the upstream has changed."""
        return None

    def has_repository(self, name: str) -> bool:
        return self.find_upstream(name)[0] is not None or self.store.has_repository(name)

    def resolve(self, name: str, tag: str) -> Digest:
        # A tag's link is written again each time the tag proves right: that is when it was last
        # compared (0.0: never). A time in the future, from a wrong clock, counts as long ago.
        compared = self.store.pushed(name, tag)
        if compared and -CLOCK_SLACK <= time.time() - compared < self.ttl:
            return self.store.resolve(name, tag)
        with contextlib.suppress(Unknown, Unavailable):
            # The upstream is away, or has lost the manifest: the tag here still counts.
            digest = self._ask(name, Remote.resolve, tag)
            if digest:
                self.store.put_manifest(name, self.manifest(name, digest), [tag], sparse=True)
        return self.store.resolve(name, tag)

    def manifest(self, name: str, digest: Digest) -> Manifest:
        try:
            return self.store.manifest(name, digest)
        except Unknown:
            manifest = self._ask(name, Remote.manifest, digest)
            if not manifest:
                raise
        self.store.put_manifest(name, manifest, sparse=True)
        return manifest

    def tags(self, name: str, last: str = "") -> Iterator[str]:
        with contextlib.suppress(Unavailable):  # the tags here still count
            tags = self._ask(name, Remote.tags, last)
            if tags is not None:
                return tags
        return self.store.tags(name, last)

    def referrers(self, name: str, subject: Digest, last: str = "") -> Iterator[Manifest]:
        with contextlib.suppress(Unavailable):  # those that are here still count
            digests = self._ask(name, Remote.referrer_digests, subject) or []
            for digest in digests[:PAGE_SIZE]:
                with contextlib.suppress(Unknown, Unavailable):  # the others still count
                    self.manifest(name, digest)  # which fetches and keeps it
        return self.store.referrers(name, subject, last)

    # The store's own would list only those that are here.
    referrer_digests = Reader.referrer_digests

    def open_blob(self, name: str, digest: Digest, offset: int = 0) -> Blob:
        try:
            return self.store.open_blob(name, digest, offset)
        except Unknown:
            size = self._ask(name, Remote.find_size, digest)
            if size is None:
                raise
        self.store.check_room(size)
        self.store.check_quota(name, size, digest)
        begin = functools.partial(self._begin_download, name, digest, size)
        if not size:  # it is empty, or the upstream does not say: then all of it comes first
            begin().join()
            return self.store.open_blob(name, digest, offset)
        session = self.store.session_of_blob(name, digest)
        whole = self.store.layout.blob_path(digest)
        return ArrivingBlob(begin, session.path, whole, size).rest(offset)

    def _begin_download(self, name: str, digest: Digest, size: int) -> threading.Thread:
        """Let a blob of this size (0: unknown) come into the store, unless it is on its way.
        Returns the thread, which ends when the download has, well or not."""
        with self.mutex:
            thread = self.downloads.get((name, digest))
            if thread is None:
                thread = threading.Thread(target=self._download, daemon=True,
                                          args=(name, digest, size, HOPS.passed))
                thread.start()
                self.downloads[name, digest] = thread
            return thread

    def _download(self, name: str, digest: Digest, size: int,
                  passed: Optional[List[str]]) -> None:
        HOPS.passed = passed  # those of the first request for it
        remote: Any  # it is one, since it has been asked for the size
        remote, path = self.find_upstream(name)
        open_rest = functools.partial(remote.open_blob, path, digest)
        open_from = functools.partial(LimitedBlob, open_rest, size or sys.maxsize)
        try:
            remote.retry(self.store.put_blob, name, digest, open_from)
        except (RegistryError, OSError) as error:
            # Whoever waits for the blob sees that it is not there; why is for our log.
            logger.warning("%s of %s was not fetched: %s", digest, name, error)
        finally:
            with self.mutex:
                del self.downloads[name, digest]

    start_upload = denied_below_upstreams(Wrapper.start_upload)
    mount = denied_below_upstreams(Wrapper.mount)
    put_manifest = denied_below_upstreams(Wrapper.put_manifest)

# -------------------------------------------------------------------------------------------------
# 11  Choice
#
# Which images are meant: lists in files of any kind, patterns, the newest versions, pins by digest,
# and the names that images get where they go. It asks a Reader and changes nothing.
# -------------------------------------------------------------------------------------------------

MAX_LIST_FILE = 64 << 20  # bytes of a file that names images; what kubectl says of 3000 pods
MAX_NAMED_LINES = 5       # that can't be read and are shown
MAX_VARIABLES = 10        # in the name of one image

# The value of an `image:` key in YAML or JSON. Group 1 is there if it is the ID of an image.
IMAGE_KEY = re.compile(
    r"""(?:^[ \t-]*|[{,][ \t]*)["']?image(ID)?["']?[ \t]*:(?:[ \t]+|(?=["']))"""
    r"""("[^"]*"|'[^']*'|(?![ \t]|\{(?!\{))(?:\$\{[^{}]*\}|[^,}])+)""")
FROM = re.compile(r"FROM\s(?:--\S+ )*(.+?)(?: [Aa][Ss] (\S+))?$")  # an image, and its alias
COMMENT = re.compile(r"^(?:\S+\s+|\s*)#.*")  # of a list; a # in JSON is none
ANCHOR = re.compile(r"""&([\w-]+)[ \t]+["']?([^\s"']+)""")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^{}]*))?\})")
TOKEN = re.compile(r"""[^\s"'`=,;|()\[\]{}<>\\]+""")


class Choice(NamedTuple):
    """An image that is meant, as a text, and FILE:LINE that names it, "" for the command line. A
    guess may be no image, or none that exists, and that is no failure."""

    image: str
    where: str = ""
    is_guess: bool = False

    def note(self, reason: object) -> str:
        """A reason why this image is not taken, and where it was named."""
        kind = ", which may name no image: left out" if self.is_guess else ""
        return "%s (%s%s)" % (reason, self.where, kind) if self.where else str(reason)


def names_repository(text: str) -> bool:
    """Whether the name has neither a tag nor a digest, so that it means a whole repository."""
    return not re.search("[:@]", text.rpartition("/")[2])


def parse_local(text: str) -> Tuple[List[str], Optional[str]]:
    """The repositories here that the name of an image may mean, the likeliest first, and the tag
    or digest, None if there is none. Raises NAME_INVALID, MANIFEST_INVALID, DIGEST_INVALID."""
    try:
        name, reference = split_image(text)
        return names_to_try(name), reference
    except Invalid:  # it may have a port: lab.example:5000/x:1
        image = parse_image(text)
        return [image.stored_name], None if names_repository(text) else image.reference


def has_reference(text: str) -> bool:
    """Whether any text could be NAME:TAG or NAME@DIGEST."""
    with contextlib.suppress(Invalid):  # that is the answer
        return not names_repository(text) and bool(parse_local(text))
    return False


def is_likely(text: str) -> bool:
    """Whether any text looks like an image: HOST.DOMAIN[:PORT]/NAME, with a tag or digest."""
    host, slash, _ = text.partition("/")
    return bool(slash) and "." in without_port(host) and has_reference(text)


def iter_listed(lines: Iterable[str]) -> Iterator[Tuple[int, str, bool]]:
    """Yield (line number, image, False) for the lines of a plain list."""
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            yield number, text, False


def iter_mentioned(lines: Iterable[str],
                   is_meant: Callable[[str], bool]) -> Iterator[Tuple[int, str, bool]]:
    """Yield (line number, image, whether it is a guess) for what YAML, JSON or a Dockerfile names,
    and as guesses all other words that are `is_meant`, and lines as a plain list has them.
    Variables have their values from ARG and ${NAME:-VALUE}; what has none stays."""
    values: Dict[str, str] = {}  # of variables, and of anchors as *NAME
    stages = {"scratch"}

    def fill_in(text: str) -> str:
        if text.count("$") > MAX_VARIABLES:
            return text
        return VARIABLE.sub(lambda match: values.get(match[1] or match[2])
                            or match[3] or match[0], text)

    for number, line in enumerate(lines, 1):
        line = re.sub(r"\s+", " ", line).rstrip()
        stage = FROM.match(line)
        if stage:
            text = fill_in(stage[1])
            if text.lower() not in stages:
                yield number, text, False
            stages.add((stage[2] or "").lower())
        elif line.lstrip().startswith("ARG "):
            for name, _, text in (word.partition("=") for word in line.split()[1:]):
                text = fill_in(text.strip("\"'"))
                if len(text) <= MAX_NAME:  # more is no part of an image; it may double each time
                    values[name] = text
        elif not line.lstrip().startswith("#"):
            values.update(("*" + name, text) for name, text in ANCHOR.findall(line))
            for is_id, text in IMAGE_KEY.findall(line):
                text = re.sub(r"^&\S+\s+|\s#.*", "", text.strip()).strip("\"' \t")
                text = fill_in(values.get(text, text))
                # A pod's status may have a digest in place of the name that its spec has.
                if not is_id and text not in ("", "null", "~") and not text.startswith("sha256:"):
                    yield number, text, "{{" in text  # of a template inside a rendered chart
            for token in TOKEN.findall(IMAGE_KEY.sub(" ", line)):
                is_line = token == line and has_reference(token)
                if is_line or is_meant(token.rstrip(".:")):
                    yield number, token.rstrip(".:"), True


def in_one_line(problems: Sequence[str]) -> str:
    """A line of text that has the first of some problems."""
    more = len(problems) - MAX_NAMED_LINES
    return "; ".join(problems[:MAX_NAMED_LINES]) + ("; and %d more" % more if more > 0 else "")


def find_problem(choice: Choice) -> str:
    """Why a line can't be read; "" if it can, or names an image for a guess only."""
    if choice.is_guess:
        return ""
    if "$" in choice.image:
        return "%s: %s: a variable has no value; put it in, for example with envsubst" % (
            choice.where, choice.image)
    with contextlib.suppress(Invalid):  # that is the problem
        parse_local(choice.image.replace("*", "x"))
        if not DIGEST.fullmatch(choice.image):
            return ""
    return "%s: %r is no image" % (choice.where, choice.image[:MAX_NAME])


def is_plain_list(lines: Iterable[str]) -> bool:
    """Whether no line has an `image:` key or a FROM, but in a comment."""
    return not any(FROM.match(line) or IMAGE_KEY.search(COMMENT.sub("", line)) for line in lines)


def read_choices(words: Iterable[str], paths: Iterable[str],
                 is_meant: Callable[[str], bool] = is_likely) -> List[Choice]:
    """The images that words and files name, each once, the guesses last, which `is_meant` tells.
    Raises CommandError with every line that can't be read, OSError."""
    choices: List[Choice] = []
    for path in paths:
        # Standard input stays open: what is read from it again is empty.
        source = sys.stdin.fileno() if path == "-" else path
        with open(source, "rb", closefd=path != "-") as file:
            content = file.read(MAX_LIST_FILE + 1)
        if len(content) > MAX_LIST_FILE:
            raise CommandError("%s is larger than %s: take the lines that name images out of it"
                               % (path, in_units(MAX_LIST_FILE)))
        lines = content.decode("utf-8-sig", "replace").split("\n")
        listed = iter_listed(lines) if is_plain_list(lines) else iter_mentioned(lines, is_meant)
        for number, text, is_guess in listed:
            if text:
                choices.append(Choice(text, "%s:%d" % (path, number), is_guess))
    problems = list(filter(None, map(find_problem, choices)))
    if problems:
        is_yaml = any(": " in choice.image + " " for choice in choices)
        advice = "; a chart's values have to be rendered first: helm template CHART -f FILE"
        raise CommandError(in_one_line(problems) + (advice if is_yaml else ""))
    unique: Dict[str, Choice] = {}
    choices.sort(key=lambda choice: choice.is_guess)
    for choice in [Choice(word) for word in words] + choices:
        unique.setdefault(choice.image, choice)
    return list(unique.values())


# Patterns and versions

# In tags that are no release: cosign's, and pre-releases.
UNRELEASED = re.compile(r"^sha(?:256|512)-|(?<![a-z])(?:rc|alpha|beta|dev)(?![a-z])")


def version_key(tag: str) -> Any:
    """The place of a tag in the order of versions: runs of digits count as numbers, and a tag
    without any is older than all that have some."""
    parts = re.split("([0-9]+)", tag.lstrip("v"))
    return len(parts) > 1, [int(part) if place % 2 else part for place, part in enumerate(parts)]


# After > or < or the like a word in which is a digit.
BOUND = re.compile(r"(?:^|,)\s*(>=?|<=?) ?(?=[^0-9,]*[0-9])([\w.+-]+)\s*(?=,|$)")
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def parse_versions(text: str) -> Callable[[str], bool]:
    """Whether a tag is a version within bounds such as >=3.18,<4. Raises CommandError."""
    limits = [(COMPARE[sign], version_key(version)) for sign, version in BOUND.findall(text)]
    if BOUND.sub("", text) or not limits:
        raise CommandError("%r is no range of versions; write for example '>=3.18,<4'" % text)
    return lambda tag: version_key(tag)[0] and all(
        compare(version_key(tag), limit) for compare, limit in limits)


class Filter(NamedTuple):
    """Which of the images that are named stay: none that fits `exclude`; and of the tags that a
    pattern matches in one repository the releases that are among the `versions`, and of these the
    `newest`, if that is a number."""

    exclude: Sequence[Any]
    newest: Optional[int]
    versions: Optional[Callable[[str], bool]] = None

    def narrows(self) -> bool:
        """Whether not all tags that a pattern fits are meant, but some of the releases."""
        return self.newest is not None or self.versions is not None

    def tags(self, name: str, tags: Iterable[str], pattern: str = "*") -> List[str]:
        """The tags that fit a pattern and stay; of releases, the newest comes first."""
        tags = [tag for tag in filter(parse_glob(pattern).fullmatch, tags)
                if not fits_any(self.exclude, name, tag)]
        if not self.narrows():
            return tags
        releases = [tag for tag in tags if not self.versions or self.versions(tag)
                    if all(word in pattern for word in UNRELEASED.findall(tag.lower()))]
        return sorted(releases, key=version_key, reverse=True)[:self.newest]


def here_too(text: str, origins: AbstractSet[str]) -> List[str]:
    """An image or a pattern; also without its host, if that is no origin: it may be what clients
    call this registry. A pattern of which only stars would be left stays as it is."""
    host, slash, path = text.partition("/")
    is_host = slash and (host == "localhost" or re.search("[.:]", host))
    is_named = re.match("[*/]*[^*/:]", path)
    is_ours = is_host and is_named and origin_of(canonical_host(host)) not in origins
    return [text, path] if is_ours else [text]


def tags_listed(path: str, origins: AbstractSet[str]) -> Callable[[str, str, Digest], bool]:
    """A function that tells whether a list names a tag of the store (repository, tag, digest), or a
    pattern in it does: rather one too many, for the others are to go. So in YAML and the like any
    word counts, and HOST/NAME:TAG means NAME:TAG, too, unless HOST is among the `origins` that the
    store has images of. NAME:TAG@DIGEST names the tag, whatever it points to; NAME@DIGEST names
    each tag that points there. Raises CommandError, also for a list that names nothing; OSError."""
    choices = read_choices((), [path], has_reference)
    if not choices:
        raise CommandError("%s: no image is named, so all tags would go" % path)
    exact: Set[str] = set()
    patterns = []
    for choice in choices:
        if "{{" in choice.image:
            logger.warning("%s: %s may name any image; no tag stays for it", choice.where,
                           choice.image[:MAX_NAME])
        for text in here_too(choice.image, origins):
            if "*" in text:
                patterns.append(parse_glob(text))
                continue
            with contextlib.suppress(Invalid):  # of a template, or a host alone
                names, reference = parse_local(text)
                reference = getattr(reference, "tag", None) or reference or "latest"
                exact.update(image_text(name, reference) for name in names)

    def is_listed(name: str, tag: str, digest: Digest) -> bool:
        if exact.intersection((image_text(name, tag), image_text(name, digest))):
            return True
        if not tag:
            return False
        spellings = {name, full_name(name), re.sub("^docker.io/(?:library/)?", "", name)}
        return any(pattern.fullmatch(image_text(spelling, tag))
                   for pattern in patterns for spelling in spellings)

    return is_listed


# Names on the way, and pins


RENAMING = re.compile("(%s)/*=(%s)?/*" % (NAME.pattern, NAME.pattern))


def parse_rename(text: str) -> Tuple[str, str]:
    """FROM=TO, with which names of repositories begin; hosts may have ports. Without TO the
    beginning is left out. Raises CommandError."""
    match = RENAMING.fullmatch(re.sub("(^|=)[^=/]*", lambda host: origin_of(host[0]), text))
    if not match:
        raise CommandError("%r is no FROM=TO; write for example docker.io/library=base" % text)
    return match[1], match[2] or ""


def begins_with(name: str, beginning: str) -> bool:
    """Whether a name begins with whole components of another one."""
    return (name + "/").startswith(beginning + "/")


def renamed(name: str, renames: Iterable[Tuple[str, str]]) -> str:
    """The name after the rename whose FROM is the longest that it begins with, in whole components.
    Raises NAME_INVALID."""
    for old, new in sorted(renames, key=lambda rename: -len(rename[0])):
        if begins_with(name, old):
            return parse_name((new + name[len(old):]).lstrip("/"))
    return name


def name_at_origin(name: str) -> str:
    """A repository's name as its registry has it, with a port's colon; one of our own stays."""
    return full_name(name) if has_origin(name) else name


def write_lock(path: Optional[str], digests: Mapping[str, Optional[Digest]]) -> None:
    """Write a line NAME:TAG@DIGEST for each image into a file, if one is named, whole or not at
    all. Raises OSError."""
    if not path:
        return
    lines = {"%s@%s\n" % (name_at_origin(image).partition("@")[0], digest)
             for image, digest in digests.items()}
    path = os.path.realpath(path)
    Files(os.path.dirname(path)).write(path, "".join(sorted(lines)).encode())

# -------------------------------------------------------------------------------------------------
# 12  Copy
#
# The one way from any registry to any other. A Plan reads manifests and decides what is to go. A
# Copy then moves the blobs, several at once, and after them the manifests: each one after all that
# it refers to, so that no tag ever points to something that is not there yet. No bytes are changed,
# except that --strip makes new indexes. It knows both registries only as Reader and Writer.
# -------------------------------------------------------------------------------------------------

MAX_MANIFESTS = 8 * MAX_MANIFEST  # bytes of memory for the manifests of an image and its referrers
MANIFEST_COST = 1 << 10           # bytes of memory that a manifest takes beside its content
MAX_PLANS = 2 * MAX_MANIFESTS     # … for those of all images that wait to be copied
# cosign gives a manifest's signature the tag sha256-HEX.sig, and so on.
COSIGN_SUFFIXES = (".sig", ".att", ".sbom")
NO_CHOICE = Choice("")


class Report:
    """What becomes of one image, counted while it is copied. `watch(report)` is called each time
    that a counter changes, from any thread. `pin` is its name in our store, with the tag, for a
    lock file."""

    def __init__(self, choice: Choice = NO_CHOICE,
                 watch: Callable[["Report"], None] = do_nothing, pin: str = "") -> None:
        self.choice = choice  # what messages call it, and where it was named
        self.image, self.where, self.pin = choice.image, choice.where, pin
        self.digest: Optional[Digest] = None
        self.watch = watch
        self.mutex = threading.Lock()
        self.total_blobs = self.total_bytes = 0    # all that the image refers to
        self.needed_blobs = self.needed_bytes = 0  # what the target lacks, by measure()
        self.copied_blobs = self.copied_bytes = 0  # what was moved
        self.present_bytes = 0                     # what the target had already
        # {digest:, type:} of the signatures, attestations, SBOMs and other referrers that go along
        self.referrers: List[Dict[str, str]] = []
        # children of indexes that stay behind: the source lacks them, or they are not wanted
        self.absent: List[Digest] = []
        # {digest of an index that lost such children: digest of what took its place}
        self.stripped: Dict[Digest, Digest] = {}
        # what the source should have, and lacks: blobs, or the image's own manifest
        self.missing: List[Digest] = []
        # what is about the image, can run, and stays behind because no key has signed it
        self.unsigned: List[str] = []
        # {tag: its digest in the source}, where that is not the one in TAG@DIGEST
        self.moved: Dict[str, Digest] = {}
        # blobs that are damaged in the source
        self.damaged: List[Digest] = []
        # whether all of it has arrived, and when, in UTC
        self.complete = False
        self.arrived: Optional[str] = None

    def add(self, **counts: int) -> None:
        """Add to counters."""
        with self.mutex:
            for counter, count in counts.items():
                setattr(self, counter, getattr(self, counter) + count)
        self.watch(self)

    def moved_bytes(self) -> int:
        """How many of the image's bytes are where they are to be."""
        return min(self.copied_bytes + self.present_bytes, self.total_bytes)

    def as_json(self) -> Dict[str, Any]:
        """All of it, for --json."""
        return {name: value for name, value in vars(self).items()
                if name not in ("choice", "pin", "watch", "mutex")}


def is_wanted(platform: str, wishes: Sequence[str]) -> bool:
    """Whether an index's entry for this platform is to be copied. Without wishes all are, and what
    is for no platform always is. The wish linux/arm64 means all variants of it."""
    if not wishes or platform in ("", NO_PLATFORM):
        return True
    return any(begins_with(platform, wish) for wish in wishes)


def strip_index(index: Manifest, kept: Dict[Digest, Optional[Manifest]],
                attestations: Set[Digest]) -> Manifest:
    """The index with its kept children only; if that is a single image, this image. An index of
    which all is kept stays as it is. Raises MANIFEST_UNKNOWN if no image is kept.

    `kept` has the manifest that goes in place of each child, None for a child that is a blob.
    Attestations are no images."""
    document, entries, manifests = index.document, [], []
    for entry in document["manifests"]:
        if entry["digest"] in kept:
            manifest = kept[entry["digest"]]
            if manifest and manifest.digest != entry["digest"]:
                entry = dict(entry, digest=manifest.digest, size=len(manifest.content),
                             mediaType=manifest.media_type)
            entries.append(entry)
            manifests.append(manifest)
    if entries == document["manifests"]:
        return index
    if attestations.issuperset(entry["digest"] for entry in entries):
        raise RegistryError("MANIFEST_UNKNOWN", index.digest,
                            message="none of the images of this index is here")
    if len(entries) == 1 and manifests[0]:
        return manifests[0]
    return parse_manifest(to_json(dict(document, manifests=entries)))


class Plan:
    """What there is to copy of one image. plan() reads the manifests of the source, and no blob.

    `platforms` (OS/ARCH[/VARIANT]) leaves the other children of an index behind. The index keeps
    its bytes and so names children that are absent, unless `strip` takes these out of it.
    `check(name, reference, digest)` raises DENIED for what may not go, as that of Signed does.

    `manifests` is in the order in which they are to be put; `blobs` and `tags` are by digest.
    If plan() raises an error, all that it has added by then stays."""

    def __init__(self, source: Reader, name: str, reference: str, platforms: Sequence[str] = (),
                 referrers: bool = True, report: Optional[Report] = None, strip: bool = False,
                 check: Callable[[str, str, Digest], None] = do_nothing) -> None:
        self.source, self.name, self.reference, self.check = source, name, reference, check
        self.platforms, self.with_referrers, self.strip = platforms, referrers, strip
        self.report = report or Report()
        self.clear()

    def clear(self) -> None:
        """Forget the plan, which takes memory. plan() makes it again."""
        self.root = Digest()  # of the image
        self.manifests: Dict[Digest, Manifest] = {}
        self.blobs: Dict[Digest, Descriptor] = {}
        self.tags: Dict[Digest, List[str]] = {}
        # {digest in the source: the manifest that goes in its place}, usually the same one. A
        # manifest that stays behind has no entry.
        self.going: Dict[Digest, Manifest] = {}
        self.children: List[Digest] = []        # all that indexes name
        self.attestations: Set[Digest] = set()  # manifests whose referrers are not looked for
        self.refused: Dict[Digest, str] = {}    # referrers that may not go, and their names
        self.free_memory = MAX_MANIFESTS        # bytes that manifests may still take

    def plan(self) -> Report:
        """Fill the plan. Raises NAME_UNKNOWN, and MANIFEST_UNKNOWN also if the image is for none of
        the platforms; DENIED as `check` does."""
        report, tag = self.report, self._find_root()
        report.referrers = []
        for manifest in walk([self.root], self._read, self._iter_needed):
            going = self.going.get(manifest.digest)
            if going:
                self.manifests[going.digest] = going
        report.digest = root = self.going[self.root].digest
        if tag or self.source.is_named(self.name, root):
            self.tags.setdefault(root, []).append(tag or root)
        report.stripped = {digest: manifest.digest for digest, manifest in self.going.items()
                           if manifest.digest != digest}
        report.absent = [child for child in dict.fromkeys(self.children)
                         if child not in self.manifests and child not in self.blobs]
        # An index may have a child that is about another one: it goes as a child.
        report.unsigned = [text for digest, text in self.refused.items()
                           if digest not in self.going]
        report.total_blobs = len(self.blobs)
        report.total_bytes = sum(blob.size for blob in self.blobs.values())
        self.check(self.name, self.reference, self.root)
        return report

    def _find_root(self) -> Optional[str]:
        """Set the root's digest; returns the tag that the image is to have. Notes if the source has
        moved the tag of TAG@DIGEST to another manifest."""
        if not isinstance(self.reference, Digest):
            self.root = self.source.resolve(self.name, self.reference)
            return self.reference
        self.root, tag = Digest(self.reference), self.reference.tag
        if tag:
            # The digest says which manifest is meant, so the tag may be gone.
            with contextlib.suppress(Unknown):
                digest = self.source.resolve(self.name, tag)
                if digest != self.root:
                    self.report.moved[tag] = digest
        return tag

    def read_manifest(self, digest: Digest) -> Manifest:
        return self.source.manifest(self.name, digest)

    def referrer_digests(self, digest: Digest) -> List[Digest]:
        return self.source.referrer_digests(self.name, digest)

    def _read(self, digest: Digest) -> Optional[Manifest]:
        """The manifest; None if it is not there and is not the image itself, because an index may
        be sparse, and a referrer may be deleted meanwhile. Raises MANIFEST_UNKNOWN,
        MANIFEST_INVALID."""
        try:
            manifest = self.read_manifest(digest)
        except Unknown:
            if digest == self.root:
                self.report.missing.append(digest)
                raise
            return None
        self.free_memory -= len(manifest.content) + MANIFEST_COST
        if self.free_memory < 0:
            raise RegistryError(
                "MANIFEST_INVALID", digest, message="the manifests of this image and of what is "
                "about it take more than %d MiB; copy one child by its digest, or leave the "
                "referrers behind" % (MAX_MANIFESTS >> 20))
        return manifest

    def _wanted_children(self, manifest: Manifest) -> List[Descriptor]:
        """The children of an index without those for other platforms. BuildKit's attestations are
        for no platform; they are small, and go along.

        Raises MANIFEST_UNKNOWN if no child is for a wanted platform."""
        children = manifest.manifests
        self.attestations.update(child.digest for child in children
                                 if child.platform == NO_PLATFORM)
        wanted = [child for child in children if is_wanted(child.platform, self.platforms)]
        has_image = not self.attestations.issuperset(child.digest for child in wanted)
        if len(wanted) < len(children) and not has_image:
            offered = sorted({child.platform for child in children} - {NO_PLATFORM})
            raise RegistryError("MANIFEST_UNKNOWN", message="no image for %s; there are %s" % (
                " or ".join(self.platforms), ", ".join(offered)))
        return wanted

    def _iter_needed(self, manifest: Manifest) -> Iterator[Digest]:
        """Yield the digests of the manifests that go along with this one: its wanted children, then
        its referrers. An index without an image for the platforms stays behind; if it is the image
        itself, MANIFEST_UNKNOWN is raised."""
        digest = manifest.digest
        # Before the children and referrers: a referrer may contain its subject, that is, this one.
        self.going[digest] = manifest
        try:
            yield from self._iter_children(manifest)
        except Unknown:
            if digest == self.root:
                raise
            del self.going[digest]
            return
        is_stripped = self.going[digest] is not manifest
        # A signature of an index is none of the index that strip makes of it.
        if self.with_referrers and not is_stripped and digest not in self.attestations:
            yield from self._iter_referrers(digest)

    def _iter_children(self, manifest: Manifest) -> Iterator[Digest]:
        """Yield the digests of the wanted children, and plan the blobs. Raises MANIFEST_UNKNOWN."""
        wanted = self._wanted_children(manifest)
        for child in wanted:
            if child.media_type in MANIFEST_TYPES:
                yield child.digest
            else:
                self.blobs[child.digest] = child  # BuildKit's cache is an index of layers
        # walk() comes back for more only when the child is planned, with all that it leads to. So
        # from here on it is known which children go along.
        self.children += [child.digest for child in manifest.manifests]
        self.blobs.update((blob.digest, blob) for blob in manifest.blobs if not blob.foreign)
        if self.strip and manifest.manifests:
            kept = {child.digest: self.going.get(child.digest) for child in wanted
                    if child.digest in self.going or child.media_type not in MANIFEST_TYPES}
            self.going[manifest.digest] = strip_index(manifest, kept, self.attestations)

    def _find_referrers(self, digest: Digest) -> Iterator[Tuple[Digest, str]]:
        """Yield what is about a manifest: its referrers, with "", and what cosign has tagged with
        its digest, with the end of that tag."""
        for referrer in self.referrer_digests(digest):
            if referrer not in self.going:
                yield referrer, ""
        for suffix in COSIGN_SUFFIXES:
            tag = fallback_tag(digest) + suffix
            if self.source.may_have_tag(self.name, tag):
                # Most images have no such tag; or the source is Signed.
                with contextlib.suppress(Unknown, Refused):
                    yield self.source.resolve(self.name, tag), suffix

    def _iter_referrers(self, digest: Digest) -> Iterator[Digest]:
        """Yield the digests of what is about a manifest, and report what goes along."""
        for referrer, suffix in self._find_referrers(digest):
            tag = fallback_tag(digest) + suffix
            try:
                self.check(self.name, tag, referrer)
            except Refused:
                self.refused[referrer] = image_text(self.name, tag if suffix else referrer)
                continue
            if suffix:
                self.attestations.add(referrer)
            yield referrer
            if referrer in self.going:
                going, kind = self.going[referrer], "cosign's " + suffix
                if suffix:
                    self.tags.setdefault(going.digest, []).append(tag)
                else:
                    kind = going.artifact_type or "referrer"
                self.report.referrers.append({"digest": going.digest, "type": kind})


class Traffic:
    """What all copies of one command share: `jobs` threads for their blobs, which together move at
    most `rate` bytes a second (0: any number)."""

    def __init__(self, jobs: int = 4, rate: int = 0) -> None:
        self.rate = Rate(rate)
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.turns: Dict[Digest, threading.Lock] = {}  # held while a blob is copied


class Copy(Plan):
    """The copy of one image to a target: plan() and measure() change nothing, run() moves the
    bytes. `choices` are those of Plan."""

    def __init__(self, source: Reader, target: Registry, name: str, reference: str,
                 target_name: Optional[str] = None, traffic: Optional[Traffic] = None,
                 **choices: Any) -> None:
        super().__init__(source, name, reference, **choices)
        self.target, self.target_name = target, target_name or name
        self.traffic = traffic or Traffic()
        self.begun: Set[Digest] = set()  # blobs whose bytes have been asked for

    def clear(self) -> None:
        super().clear()
        self.present: Set[Digest] = set()  # manifests that the target has, if it is nearer
        self.ask_source = functools.lru_cache(maxsize=None)(super().referrer_digests)
        self.ask_target = functools.lru_cache(maxsize=None)(
            lambda digest: self.target.referrer_digests(self.target_name, digest))

    def read_manifest(self, digest: Digest) -> Manifest:
        """From the target, if it has the manifest and is nearer: Docker Hub counts reads."""
        if self.source.is_distant and not self.target.is_distant:
            # The target lacks it, can't be read (as an archive), or has it damaged.
            with contextlib.suppress(Unknown, Unsupported, Invalid):
                manifest = self.target.manifest(self.target_name, digest)
                self.present.add(digest)
                return manifest
        return super().read_manifest(digest)

    def referrer_digests(self, digest: Digest) -> List[Digest]:
        """From the source. If the target is nearer, and has the image and all that is about it,
        what is about the children that it has is read there: who signs a child signs the index as
        well, and so a rerun costs one request instead of one for each child."""
        if (digest != self.root and {digest, self.root} <= self.present
                and set(self.ask_source(self.root)).issubset(self.ask_target(self.root))):
            return self.ask_target(digest)
        return self.ask_source(digest)

    def measure(self) -> Dict[Digest, int]:
        """{digest: bytes that the target lacks} of the blobs that it has not got whole."""
        present_bytes = functools.partial(self.target.present_bytes, self.target_name)
        blobs = list(self.blobs.values())
        lacking = {blob.digest: blob.size - present for blob, present
                   in zip(blobs, self.traffic.pool.map(present_bytes, blobs))
                   if present < blob.size}
        self.report.needed_blobs, self.report.needed_bytes = len(lacking), sum(lacking.values())
        return lacking

    def run(self) -> Report:
        """Move what is planned. If a blob is missing or damaged in the source, the manifests that
        need it are left out, and so are their tags. Raises RegistryError, OSError."""
        list(self.traffic.pool.map(self._put_blob, self.blobs.values()))
        lost = set(self.report.missing + self.report.damaged)
        self.report.complete = not lost
        for manifest in self.manifests.values():
            if lost.intersection(entry.digest for entry in manifest.blobs + manifest.manifests):
                lost.add(manifest.digest)
            else:
                self._put_manifest(manifest)
        return self.report

    def _put_blob(self, blob: Descriptor) -> None:
        """Copy a blob, unless the target can mount it, as when another image's copy was at it. One
        that is missing or damaged in the source is noted in the report."""
        with self.traffic.turns.setdefault(blob.digest, threading.Lock()):
            if self.target.mount(self.target_name, blob.digest):
                self.report.add(present_bytes=blob.size)
                return
            try:
                self.source.retry(self.target.put_blob, self.target_name, blob.digest,
                                  functools.partial(self._open_from, blob))
                self.report.add(copied_blobs=1)
            except Unknown:
                if blob.digest not in self.report.missing:
                    raise  # the target's repository or upload session is not there
            except Invalid:
                if not self.source.find_damage(blob.digest):
                    raise
                self.report.damaged.append(blob.digest)

    def _open_from(self, blob: Descriptor, offset: int) -> LimitedBlob:
        """The rest of a blob of the source, whose bytes the report counts as they are read."""
        open_rest = functools.partial(self.source.open_blob, self.name, blob.digest)
        try:
            rest = LimitedBlob(open_rest, blob.size, offset, self._count_copied,
                               self.traffic.rate.piece)
        except Unknown:
            self.report.missing.append(blob.digest)
            raise
        # A later attempt begins after bytes that this copy has moved, and has counted as such.
        if blob.digest not in self.begun:
            self.begun.add(blob.digest)
            self.report.add(present_bytes=offset)
        return rest

    def _count_copied(self, count: int) -> None:
        self.report.add(copied_bytes=count)
        self.traffic.rate.wait(count)

    def _put_manifest(self, manifest: Manifest) -> None:
        """Put a manifest under its tags, if it has any. Blobs that the target took for present, and
        then finds damaged, are sent again."""
        put = functools.partial(self.target.put_manifest, self.target_name, manifest,
                                self.tags.get(manifest.digest, ()))
        try:
            put()
        except (BlobsMissing, Invalid, Unknown, Unsupported) as error:
            if isinstance(error, BlobsMissing) and error.details:  # only stores of ours say which
                for digest in error.details:
                    self._put_blob(self.blobs[digest])
                return put()
            absent = {child.digest for child in manifest.manifests}.intersection(self.report.absent)
            if not absent or error.details:
                raise
            # Distribution and others take no index with absent children.
            raise RegistryError(
                error.code, message="%s; it seems to take an index with all its children only, and "
                "%d of them are not here: copy them as well; or add --strip, which takes them out "
                "of the index and so changes its digest (the images in it keep theirs)"
                % (error.message, len(absent)))


def copy(*places: Any, **choices: Any) -> Report:
    """Plan and run a Copy of one image."""
    work = Copy(*places, **choices)
    with work.traffic.pool:
        work.plan()
        return work.run()

# -------------------------------------------------------------------------------------------------
# 13  Artifacts
#
# Files and Helm charts as images of one registry, in the form of oras and helm, and the way back to
# files. How they are stored, copied and deleted is left to the rooms above. What a stranger's
# manifest calls its files is checked before it becomes a path.
# -------------------------------------------------------------------------------------------------

FILE = "application/vnd.oci.image.layer.v1.tar"  # what oras calls any file, whether it is a tar
ANNOTATION = "org.opencontainers.image."
CHART = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
PROVENANCE = "application/vnd.cncf.helm.chart.provenance.v1.prov"
CHART_SUFFIXES = {CHART: ".tgz", PROVENANCE: ".tgz.prov"}
CHART_ANNOTATIONS = (("name", "title"), ("version", "version"), ("description", "description"),
                     ("home", "url"))  # fields, and what helm calls them in the manifest
MAX_CHART = 100 << 20  # bytes of an unpacked chart; helm takes no more
CHART_YAML = re.compile(r"(?:\./)?[^/]+/Chart\.yaml")
# A field of Chart.yaml that is one text, in quotes or plain, once its lines are joined. What else
# there may be is passed over: lists, blocks, and what would need all of YAML to be understood.
CHART_FIELD = re.compile(
    r"^(apiVersion|appVersion|description|home|icon|kubeVersion|name|type|version):[ \t]+"
    r"(?:\"([^\"\\\n]*)\"|'([^'\n]*)'|([^\s\"'&*!{\[%@`|>#]\S*(?:[ \t]+[^\s#]\S*)*))"
    r"[ \t]*(?:#.*)?$(?!\n[ \t])", re.MULTILINE)


# Charts

def parse_chart(content: bytes) -> Dict[str, str]:
    """The fields of a Chart.yaml that CHART_FIELD knows. Raises CommandError."""
    text = content.decode("utf-8-sig", "replace").replace("\r", "")
    text = re.sub("\n[ \t]+", " ", text)  # helm folds long ones
    chart = {key: "".join(values) for key, *values in CHART_FIELD.findall(text)}
    if not chart.keys() >= {"apiVersion", "name", "version"}:
        raise CommandError("helm would refuse this chart: its Chart.yaml has no apiVersion, name "
                           "or version that is a text")
    return chart


def read_chart(path: str, scratch: str) -> Optional[Dict[str, str]]:
    """What the Chart.yaml in a .tgz says; None for a file that is no chart. Raises CommandError,
    OSError."""
    if not path.endswith(".tgz"):
        return None
    # The file is damaged, or no tar; or this Python can't read gzip.
    with contextlib.suppress(ValueError, ImportError):
        with importlib.import_module("gzip").open(path) as file, unpack(
                itertools.islice(iter_blocks(file), MAX_CHART // SPOOL_BLOCK), scratch) as tar:
            for entry in iter_tar(tar):
                if CHART_YAML.fullmatch(entry.name):
                    return parse_chart(Member(path, tar, entry.offset_data, entry.size).read())
    return None


# Artifacts

def files_in(registry: Reader, name: str, manifest: Manifest) -> Dict[str, Descriptor]:
    """The files of an artifact, by their names, which may have folders; none in a container image.
    A chart is called as `helm pull` calls it; a folder that oras has packed is a file .tar.gz.
    Raises MANIFEST_INVALID, DIGEST_INVALID."""
    files: Dict[str, Descriptor] = {}
    chart: Optional[Dict[str, Any]] = None
    document, _ = manifest.document, manifest.blobs  # to read the blobs is to check them all
    for entry in (document.get("layers") or []) + (document.get("blobs") or []):
        blob, annotations = parse_descriptor(entry), entry.get("annotations")
        annotations = annotations if isinstance(annotations, dict) else {}
        title = annotations.get(ANNOTATION + "title")
        if blob.media_type in CHART_SUFFIXES:
            chart = chart or read_config(registry, name, manifest) or {"name": ""}
            title = "%(name)s-%(version)s" % collections.defaultdict(str, chart)
            title += CHART_SUFFIXES[blob.media_type]
        if not isinstance(title, str) or not title:
            continue
        if annotations.get("io.deis.oras.content.unpack") == "true":
            title += ".tar.gz"
        is_bad = {"", ".", ".."}.intersection(title.split("/")) or harmless(title) != title
        if is_bad or files.setdefault(title, blob).digest != blob.digest:
            raise RegistryError("MANIFEST_INVALID", title[:MAX_NAME], message=(
                "refused, for it may lead out of the folder, or can't be shown" if is_bad
                else "two files have one name"))
    return files


def put_file(registry: Registry, name: str, path: str, media_type: str) -> Document:
    """Store a file as a blob, without keeping it in memory; returns its descriptor. Raises
    OSError; DIGEST_INVALID if the file changes meanwhile."""
    member = Member(path, None, 0, os.path.getsize(path))
    digest = read_digest(member)
    registry.put_blob(name, digest, lambda offset: member.open().rest(offset))
    return {"mediaType": media_type, "digest": digest, "size": member.length,
            "annotations": {ANNOTATION + "title": os.path.basename(path)}}


def put_artifact(registry: Registry, name: str, tag: str, paths: List[str],
                 chart: Optional[Dict[str, str]] = None) -> Digest:
    """Store files as `oras push` does; or a chart, and the provenance file beside it, as `helm
    push` does. But there is no time in it: the same files have the same digest. Raises
    MANIFEST_INVALID, DIGEST_INVALID, OSError."""
    config, config_type = to_json(chart or {})[:-1], "application/vnd.oci.empty.v1+json"
    media_types = [FILE] * len(paths)
    fields: Document = {"artifactType": "application/vnd.unknown.artifact.v1"}
    if chart:
        config_type, media_types = "application/vnd.cncf.helm.config.v1+json", [CHART, PROVENANCE]
        paths = paths + list(filter(os.path.isfile, [paths[0] + ".prov"]))
        fields = {"annotations": {
            ANNOTATION + key: chart[field] for field, key in CHART_ANNOTATIONS if field in chart}}
    layers = [put_file(registry, name, *file) for file in zip(paths, media_types)]
    digest = Digest.of(config)
    session = registry.start_upload(name)
    session.append(io.BytesIO(config))
    session.commit(digest)
    manifest = parse_manifest(to_json(dict(
        fields, schemaVersion=2, mediaType=OCI_MANIFEST, layers=layers,
        config={"mediaType": config_type, "digest": digest, "size": len(config)})))
    if len(manifest.content) > MAX_MANIFEST:
        raise CommandError("these are too many files for one manifest; pack them")
    files_in(registry, name, manifest)  # checks their names
    registry.put_manifest(name, manifest, [tag])
    return manifest.digest


# Files

def place_for(folder: str, title: str, force: bool) -> str:
    """The path for a file below a folder. Raises CommandError if a link is on the way there, or a
    file is there, unless `force` replaces it."""
    path = os.path.join(os.path.realpath(folder), title)
    folder = os.path.dirname(path)
    if os.path.realpath(folder) != folder:
        raise CommandError("refused: a link is on the way to %s" % path)
    if os.path.lexists(path) and not force:
        raise CommandError("%s is there; --force replaces it, -o DIR writes elsewhere" % path)
    return path


def write_file(registry: Registry, name: str, digest: Digest, path: str) -> None:
    """Write a blob into a file, which appears when it is whole. Raises BLOB_UNKNOWN,
    DIGEST_INVALID, OSError."""
    def give(write: Callable[[Any], Any]) -> None:
        hasher = hashlib.new(digest.algorithm)
        with registry.open_blob(name, digest) as blob:
            copy_bytes(blob, blob.length, write, hasher.update)
        check_hash(hasher, digest, "file")

    make_directories(os.path.dirname(path))
    Files(os.path.dirname(path)).fill(path, give)

# -------------------------------------------------------------------------------------------------
# 14  Access
#
# Who sends a request, and what that client may do. Passwords knows the users and checks their
# passwords, Tokens makes and reads tokens, Rules knows who may do what, UploadLimit counts upload
# sessions; Access asks them for each request. The users file and the rules file are read again
# when they change. This room reads no request's body, and knows neither sockets nor registries.
# -------------------------------------------------------------------------------------------------

# A level is an index in LEVELS, and includes the levels before it.
LEVELS = ("none", "pull", "push", "admin")
IN_WORDS = ("do nothing", "pull", "pull and push", "pull, push and delete")
# The level that an action needs: the action of a route, or one in a token's scope.
NEEDED = {"look": 0, "login": 0, "watch": 1, "pull": 1, "push": 2, "delete": 3, "*": 3}

# A user is none of the rules' own words, * and @anonymous, and is valid UTF-8.
USER = re.compile(r"[^\s:#*@\x00-\x1f\x7f\ud800-\udfff][^\s:#\x00-\x1f\x7f\ud800-\udfff]{0,127}")
RULE = re.compile(r"((?:[a-z0-9._/*-]|\{user\})+)[ \t]+(\S+)[ \t]+(none|pull|push|admin)")
SCRYPT = re.compile(r"(\$scrypt\$ln=14,r=8,p=1\$([A-Za-z0-9+/]{24})\$)([A-Za-z0-9+/]{43})?")
MAX_PASSWORD = 72            # bytes; bcrypt reads no more, and Go's refuses more
TOKEN_LIFE = 300             # seconds; docker asks for a new one when it needs it
TOKEN_PATH = "/v2/token"     # many a proxy passes /v2/ alone, as Distribution's documentation says
MAX_FAILURES = 10            # wrong passwords that a client may send in …
FAILURE_WINDOW = 60.0        # … so many seconds
REMEMBERED = 10000           # verified passwords that are kept, and clients whose failures are
PROXY_HEADER = re.compile(r"forwarded|via|x-forwarded.*|x-real-ip")  # what proxies add


class Who(NamedTuple):
    """Who sent a request: a user, or None. If a token says so, `grants` limits it: {repository:
    level}."""

    user: Optional[str]
    grants: Optional[Dict[str, int]]


class Request:
    """One request: the method, the decoded path, the query, the headers by their names in lower
    case, and the body, a file to read once.

    The values of a header that is repeated are joined by commas: docker sends its Accept in six
    lines. `client` is the address that the request came from, through proxies that we believe.
    `certificate` is the user whom the client's TLS certificate names, if it has one. `ca` is the
    certificate of the CA that made the server's certificate. `version` is HTTP's."""

    def __init__(self, method: str, target: str, headers: Optional[Dict[str, str]] = None,
                 body: Any = None, client: str = "", scheme: str = "http",
                 certificate: Optional[str] = None, ca: Optional[bytes] = None,
                 version: str = "1.1") -> None:
        path, _, query = origin_form(target).partition("?")
        self.method = method
        self.path = urllib.parse.unquote(path)
        self.query = urllib.parse.parse_qs(query, keep_blank_values=True)
        self.headers = headers or {}
        self.client = client
        self.scheme = scheme
        self.certificate = certificate
        self.version = version
        self.body = body or io.BytesIO()
        self.ca = ca
        self.who: Optional[Who] = None         # once Access has identified the client
        self.route: Any = None                 # its row in the table of routes, if there is one, …
        self.path_values: Dict[str, Any] = {}  # … and what the path has: name, reference, digest, …
        self.access: Any = None                # the Access that decides what the client may do
        self.observation: Any = None           # the server's Observation
        # Raises ClientLeft once nobody waits for the response any more.
        self.check_wanted: Callable[[], None] = do_nothing

    def allows(self, action: str, name: Optional[str] = None) -> bool:
        """Whether the client may do this; see Access."""
        return self.access.allows(self, action, name)

    def get(self, parameter: str, default: Any = None) -> Any:
        """The last value of a query parameter, or the default without one."""
        return self.query.get(parameter, [default])[-1]

    def header(self, name: str, default: str = "") -> str:
        return self.headers.get(name, default)

    def forwarded(self, name: str, default: str) -> str:
        """What a proxy says that its client sent: the first value of X-Forwarded-NAME, or the
        default without that header; "" if it does not look like a host or a scheme."""
        value = self.header("x-forwarded-" + name, default).split(",")[0].strip()
        return value if re.fullmatch(r"[0-9A-Za-z.:_\[\]-]{1,255}", value) else ""

    def host(self) -> str:
        """HOST[:PORT] of this registry, as its client knows it."""
        return self.forwarded("host", self.header("host")) or "HOST"

    def outer_scheme(self) -> str:
        """https or http, as the client knows it."""
        return "https" if self.forwarded("proto", self.scheme) == "https" else "http"


# Passwords

@functools.lru_cache(maxsize=None)
def load_crypt() -> Any:
    """The system's crypt(3), or None. It returns a static buffer, so two calls must not overlap."""
    # None is the program itself: musl, macOS and OpenBSD have crypt in their C library.
    for library in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.so", None):
        # Either there is no such library, or it has no crypt.
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes  # not at the top, because a Python without libffi can serve as well
            crypt = ctypes.CDLL(library).crypt
            crypt.argtypes, crypt.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_char_p
            return crypt
    return None


def hash_password(password: str, setting: str) -> str:
    """The hash of a password under a setting, as crypt(3) makes it; "" for an unknown scheme.

    A setting is the begin of a hash, or a whole hash: a right password gives the hash back. The
    schemes are those of the system, and our scrypt."""
    match = SCRYPT.fullmatch(setting)
    if match and hasattr(hashlib, "scrypt"):
        hashed = hashlib.scrypt(password.encode(), salt=base64.b64decode(match[2]),
                                n=1 << 14, r=8, p=1, dklen=32)
        return match[1] + base64.b64encode(hashed).decode().rstrip("=")
    crypt = load_crypt()
    hashed = crypt and crypt(password.encode(), setting.encode("utf-8", "surrogateescape"))
    return (hashed or b"").decode("latin-1")


def is_checkable(stored: str) -> bool:
    """Whether this host can check passwords against a hash: it knows the scheme, and the hash has
    the right length."""
    hashed = hash_password("", stored)
    return (len(hashed) == len(stored) and hashed[:2] == stored[:2]
            and not hashed.startswith("*"))


def new_hash(password: str) -> str:
    """A hash for a users file. Raises UNSUPPORTED.

    It is bcrypt, which Distribution reads too: $2y$, because Apache reads no other, or $2b$ on
    BSDs that have no other. It is scrypt if crypt(3) has no bcrypt, as on macOS."""
    salt = base64.b64encode(os.urandom(18)).decode()
    letters = salt[:21].replace("+", ".")  # bcrypt's letters are those of base64, but . for +
    for setting in ("$2y$10$%s." % letters, "$2b$10$%s." % letters,
                    "$scrypt$ln=14,r=8,p=1$%s$" % salt):
        hashed = hash_password(password, setting)
        if hashed.startswith(setting[:7]) and is_checkable(hashed):
            return hashed
    raise RegistryError("UNSUPPORTED", message="neither crypt(3) nor hashlib of this system has "
                        "bcrypt or scrypt")


def parse_users(content: bytes) -> Dict[str, str]:
    """{user: hash} of an htpasswd file. A user whose hash can't be checked here is logged."""
    users = {}
    checkable: Set[Tuple[str, int]] = set()  # a slow hash is slow to try: once per scheme
    for line in content.decode("utf-8", "surrogateescape").split("\n"):
        user, colon, stored = line.strip().partition(":")
        if not colon or line.startswith("#"):
            continue
        scheme = stored[:3], len(stored)
        if scheme not in checkable and is_checkable(stored):
            checkable.add(scheme)
        if scheme in checkable and USER.fullmatch(user) and re.fullmatch("[!-~]+", stored):
            users[user] = stored
        else:
            logger.warning("user %s can't log in: the password's hash is of a kind that can't be "
                           "checked here; set it again with: tinyreg.py passwd USER --users FILE",
                           ascii(user))
    return users


def read_settings(path: Optional[str], hint: str = "") -> bytes:
    """The content of a file that --users or --rules names; nothing without one. Raises OSError,
    CommandError."""
    content = read_file(path, -1) if path else b""
    if content is None:
        raise CommandError("there is no %s%s" % (path, hint))
    return content


class WrongPasswords:
    """Counts the wrong passwords of each client, over all processes of a server.

    It is made in shared memory before the fork, and nobody waits for it: of two processes that
    count at the very same moment, one may be lost, which is one guess more. A client's place
    follows from a keyed hash, which nobody can foresee. If another client has
    the same place, it takes the place over: a count is forgotten, but nobody is locked out."""

    def __init__(self) -> None:
        # Three numbers for each place: whose it is, since when, and how many.
        self.cells = memoryview(mmap.mmap(-1, 24 * REMEMBERED)).cast("d")
        self.key = os.urandom(16)

    def add(self, client: str, amount: int) -> Tuple[int, int]:
        """Add to a client's count. Returns the count, and the seconds until it ends."""
        # 0 is nobody's, and a cell has room for 53 bits.
        digest = hashlib.blake2b(client.encode(), digest_size=6, key=self.key).digest()
        owner, now = int.from_bytes(digest, "big") + 1, time.monotonic()
        start = owner % REMEMBERED * 3
        count = self.cells[start:start + 3]
        if count[0] != owner or now - count[1] > FAILURE_WINDOW:
            count[2], count[1], count[0] = 0, now, owner
        count[2] += amount
        return int(count[2]), int(count[1] + FAILURE_WINDOW - now) + 1


class Passwords:
    """The users of an htpasswd file, and the check of their passwords."""

    def __init__(self, path: Optional[str]) -> None:
        self.path = path
        self.users: Dict[str, str] = {}
        self.failures = WrongPasswords()
        self.verified: Set[bytes] = set()  # digests of users with right passwords …
        self.secret = os.urandom(32)       # … and the key of these digests
        # Held while a password is hashed: crypt(3) needs it, and people who guess get one core.
        self.hashing = threading.Lock()

    def read(self) -> Dict[str, str]:
        """{user: hash} of the file. Raises OSError, CommandError."""
        content = read_settings(self.path, "; make it with: tinyreg.py passwd NAME --users %s"
                                % self.path)
        with self.hashing:
            return parse_users(content)

    def check(self, client: str, credentials: str) -> str:
        """The user of `USER:PASSWORD` in base64. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        try:
            text = base64.b64decode(credentials, validate=True).decode("utf-8")
        except ValueError:
            raise RegistryError("UNAUTHORIZED",
                                message="the credentials are not USER:PASSWORD in base64")
        user, _, password = text.partition(":")
        if not user and not password:  # podman and skopeo send this if they are not logged in
            raise RegistryError("UNAUTHORIZED")
        if "\0" in text or len(password) > 1024:
            password = ""  # crypt(3) would read up to the NUL only
        stored = self.users.get(user, "")
        login = "\0".join((user, password, stored)).encode()
        digest = hashlib.blake2b(login, key=self.secret).digest()
        if digest not in self.verified:
            with self.hashing:
                # docker sends several requests at once: another thread may have verified it.
                if digest not in self.verified:
                    self._verify(client, user, password, stored)
                    self.verified.add(digest)
        return user

    def _verify(self, client: str, user: str, password: str, stored: str) -> None:
        """Raises UNAUTHORIZED if the password is wrong, TOOMANYREQUESTS if the client has sent too
        many wrong ones."""
        key = client_key(client)
        if is_this_machine(client):
            key += " " + user  # the client may be a proxy here: it must not lock out all users
        # Count before the check, because other requests of this client are under way.
        count, wait = self.failures.add(key, 1)
        if count > MAX_FAILURES:
            self.failures.add(key, -1)
            raise RegistryError.too_many(wait, "too many wrong passwords from %s; try again in %s"
                                         % (client, counted(wait, "second")))
        # For an unknown user, hash as well: the time must not tell who exists.
        setting = stored or next(iter(self.users.values()), "")
        hashed = hash_password(password, setting).encode()
        if not stored or not password or not hmac.compare_digest(hashed, stored.encode()):
            raise RegistryError("UNAUTHORIZED", message="wrong user name or password")
        self.failures.add(key, -1)
        if len(self.verified) >= REMEMBERED:
            self.verified.clear()


# Tokens

class Tokens:
    """The tokens of clients that have logged in (Distribution's token protocol).

    A token is PAYLOAD.SIGNATURE, both in base64url; the payload is [user, end, grants] in JSON.
    The signature is also over the hash of the user's password, so a new password ends the tokens.
    Servers and workers with the same key accept each other's tokens."""

    def __init__(self, key: Optional[bytes], passwords: Passwords) -> None:
        self.key = key or os.urandom(32)
        self.passwords = passwords

    def _sign(self, payload: bytes, user: Optional[str]) -> bytes:
        stored = self.passwords.users.get(user or "", "")
        return hmac.new(self.key, payload + b"." + stored.encode(), "sha256").digest()

    def make(self, user: Optional[str], scopes: Iterable[str]) -> str:
        """A token for a user, or for a client without one. It grants what the scopes
        (`repository:NAME:pull,push`) ask for; the rules have the last word."""
        grants: Dict[str, int] = {}
        for scope in " ".join(scopes).split()[:100]:
            match = re.fullmatch("repository[^:]*:(.*):([^:]*)", scope)
            if match:
                name, actions = match.groups()
                levels = [NEEDED.get(action, 0) for action in actions.split(",")]
                grants[name] = max(levels + [grants.get(name, 0)])
        payload = base64.urlsafe_b64encode(to_json([user, int(time.time()) + TOKEN_LIFE, grants]))
        return (payload + b"." + base64.urlsafe_b64encode(self._sign(payload, user))).decode()

    def read(self, token: str) -> Optional[Who]:
        """Whose token this is; None if it is not valid, or no longer."""
        payload, _, signature = token.encode("latin-1", "replace").partition(b".")
        try:
            text = base64.urlsafe_b64decode(payload).decode()
            # As floats, because Python takes long for an int of many digits.
            user, end, grants = json.loads(text, parse_int=float)
            expected = self._sign(payload, user)
            if not hmac.compare_digest(base64.urlsafe_b64decode(signature), expected):
                return None
        except (ValueError, TypeError, RecursionError):
            return None
        # A token that ends too late was made while the clock was wrong. It could be good for years.
        is_valid = 0 <= end - time.time() <= TOKEN_LIFE + CLOCK_SLACK
        return Who(user, grants) if is_valid else None


# Rules

class Rule(NamedTuple):
    """A line of a rules file: what a user may do in the repositories that fit the glob."""

    glob: str
    user: str
    level: int

    def fits(self, user: str, name: str) -> bool:
        """Whether it is about this repository. {user} in the glob is the name of who asks, if that
        can be one component of a repository's name: no other could stand there, and a user called
        ** shall not get everything."""
        if "{user}" in self.glob and ("/" in user or not NAME.fullmatch(user)):
            return False
        return bool(parse_glob(self.glob.replace("{user}", user)).fullmatch(name))

    def example(self, user: str) -> str:
        """The name of a repository that it may be about."""
        return self.glob.replace("{user}", user).replace("**", "*").replace("*", "a")


def parse_rules(content: bytes) -> List[Rule]:
    """The rules in a file; its last line is first, because the last match counts. Raises
    CommandError."""
    rules: List[Rule] = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        match = RULE.fullmatch(text)
        if match:
            glob, user, level = match.groups()
            rules.insert(0, Rule(glob, user, LEVELS.index(level)))
        elif text:
            raise CommandError("--rules: line %d is no rule: %r; write REPOSITORY-GLOB "
                               "USER|*|@anonymous pull|push|admin|none" % (number, text))
    return rules


def check_rules(rules: Sequence[Rule], anonymous: int) -> None:
    """Raises CommandError for a rule that gives users no more than --anonymous, which is this
    level, gives everybody: it would bind nobody, without a word. If it is about all users and all
    names it may give as much, because other rules add to it."""
    for rule in rules if anonymous else ():
        least = rule.level + (rule[:2] == ("**", "*"))
        if rule.user != "@anonymous" and least <= anonymous and not any(
                other.user == "@anonymous" and other.fits("", rule.example("a"))
                for other in rules):
            raise CommandError(
                "--rules: the line %s %s %s binds nobody, because --anonymous %s lets everybody do "
                "as much there; add the line %s @anonymous none, or leave out --anonymous"
                % (*rule[:2], LEVELS[rule.level], LEVELS[anonymous],
                   rule.glob.replace("{user}", "*")))


class Rules:
    """Who may do what in which repository.

    If no rule matches, a user may do everything without a rules file, and nothing with one. A
    client that is no user may do what --anonymous says. A user may always do what such a client
    may: logging out must not help."""

    def __init__(self, path: Optional[str], anonymous: str) -> None:
        self.path = path
        self.rules: List[Rule] = []
        self.anonymous = LEVELS.index(anonymous)
        self.default = LEVELS.index("none" if path else "admin")

    def level(self, user: Optional[str], name: Optional[str] = None) -> int:
        """What a user, or a client without one, may do in a repository; or, without a name, what
        it may do in some, as far as that is known without asking for each."""
        if name is None:
            return NEEDED["*"] if user else max([self.anonymous] + [
                rule.level for rule in self.rules if rule.user == "@anonymous"])
        names = (user, "*") if user else ("@anonymous",)
        default = self.default if user else self.anonymous
        levels = (rule.level for rule in self.rules
                  if rule.user in names and rule.fits(user or "", name))
        level = next(levels, default)
        return max(level, self.level(None, name)) if user else level

    def place_to_push(self, user: str) -> Optional[str]:
        """A glob of names under which a user may push, of a rule about this user; or None."""
        for rule in self.rules:
            is_about = rule.user in (user, "*")
            if is_about and self.level(user, rule.example(user)) >= NEEDED["push"]:
                return rule.glob.replace("{user}", user)
        return None


MAY_PUSH = ", but may push to "  # where a denial begins to name other repositories


class UploadLimit:
    """Limits the upload sessions that one client has open in one process. A client on this machine
    has no limit, because it may be a proxy."""

    def __init__(self) -> None:
        self.sessions: Dict[str, List[Tuple[str, str]]] = {}  # by client: (name, session id)

    def count(self, client: str, session: Any, is_open: Callable[[str, str], bool]) -> None:
        """Count a new session. Raises TOOMANYREQUESTS, and cancels the session, if the client has
        too many; `is_open(name, id)` tells whether an earlier one still counts."""
        if is_this_machine(client):
            return
        sessions = self.sessions.setdefault(client_key(client), [])
        if len(sessions) >= MAX_UPLOADS or len(sessions) % 100 == 99:
            sessions[:] = [earlier for earlier in sessions if is_open(*earlier)]
        if len(sessions) >= MAX_UPLOADS:
            session.cancel()
            raise RegistryError.too_many(60, "%s has too many uploads open; finish or cancel some"
                                         % client)
        sessions.append((session.name, session.id))


class Access:
    """Who may do what in one registry.

    `only_local` says that only this machine can connect, and that nobody gave --anonymous: then a
    request must be addressed to this machine. Raises OSError, CommandError if the users file or
    the rules file can't be read."""

    def __init__(self, anonymous: str = "none", users: Optional[str] = None,
                 rules: Optional[str] = None, key: Optional[bytes] = None,
                 only_local: bool = False, client_ca: Optional[str] = None) -> None:
        self.users_file = users
        self.client_ca = client_ca  # the file of a CA whose certificates name users, too
        self.only_local = only_local
        self.passwords = Passwords(users)
        self.tokens = Tokens(key, self.passwords)
        self.rules = Rules(rules, anonymous)
        self.uploads = UploadLimit()
        self.watch = Watch(users, rules)
        self._load()

    def _load(self) -> None:
        users, rules = self.passwords.read(), parse_rules(read_settings(self.rules.path))
        if self.users_file or self.client_ca:
            check_rules(rules, self.rules.anonymous)
        self.passwords.users, self.rules.rules = users, rules  # both, or none

    # Who sends a request

    def identify(self, request: Request) -> Who:
        """Who sent a request. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        if request.who is None:
            if self.watch.changed():
                try:
                    self._load()
                except (OSError, CommandError) as error:
                    logger.error("the former users and rules stay in force: %s", error)
            request.who = self._identify(request)
        return request.who

    def _identify(self, request: Request) -> Who:
        scheme, _, value = request.header("authorization").partition(" ")
        scheme = scheme.lower() if self.users_file else ""
        if scheme == "basic":
            try:
                return Who(self.passwords.check(request.client, value.strip()), None)
            except Refused as error:
                raise self._unauthorized(request, error.message)
        if scheme == "bearer":
            who = self.tokens.read(value.strip())
            if not who:
                raise self._unauthorized(request, "the token is not valid, or no longer",
                                         error="invalid_token")
            return who
        return Who(request.certificate, None)

    def _unauthorized(self, request: Request, message: Optional[str] = None,
                      **problem: str) -> RegistryError:
        """A 401 whose challenge makes the client send what it has.

        The challenge is Basic, which needs no URL that a proxy could spoil, unless some may come
        without a password. Then a read is answered with Bearer alone: a docker that is logged out
        gives up at Basic, and at Bearer goes on without a password. A write is answered with Basic,
        unless the client has sent a token: BuildKit gets tokens in a process that trusts no CA but
        the system's. The parameters are in both, because oras-py finds the token's URL in them."""
        host = request.forwarded("host", request.header("host"))
        challenge = 'Basic realm="tinyreg"'
        is_api = request.path.startswith("/v2") and request.path != TOKEN_PATH
        if self.rules.level(None) and is_api and host:
            realm = "%s://%s%s" % (request.outer_scheme(), host, TOKEN_PATH)
            problem = dict(realm=realm, service="tinyreg", **problem)
            has_token = request.header("authorization")[:7].lower() == "bearer "
            scheme = "Bearer" if has_token or request.method in ("GET", "HEAD") else "Basic"
            challenge = scheme + " " + ",".join('%s="%s"' % item for item in problem.items())
        return RegistryError("UNAUTHORIZED", message=message,
                             headers=[("WWW-Authenticate", challenge)])

    def make_token(self, request: Request, scopes: Iterable[str]) -> str:
        """A token for the client that sent a request, with a password or, if it needs none,
        without. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        who = self.identify(request)
        if who.grants is not None:
            raise self._unauthorized(request, "a token can't be had for a token")
        return self.tokens.make(who.user, scopes)

    # What it may do

    def allows(self, request: Request, action: str, name: Optional[str] = None) -> bool:
        """Whether the client may do this in a repository, or in any if there is no name. Raises as
        identify does."""
        who, needed = self.identify(request), NEEDED[action]
        if who.grants is not None and name is not None:
            # A token to pull library/alpine is also good where a mirror keeps it, as in
            # docker.io/library/alpine: its client can't know that name.
            parts = name.split("/")
            starts = range(len(parts) if action == "pull" else 1)
            if not any(who.grants.get("/".join(parts[start:]), 0) >= needed for start in starts):
                return False
        return self.rules.level(who.user, name) >= needed

    def lists(self, request: Request, name: str) -> bool:
        """Whether the catalog shows a repository to the client, whatever its token grants."""
        return self.rules.level(self.identify(request).user, name) > 0

    def pulls_everything(self, request: Request) -> bool:
        """Whether the client may pull from all repositories, and no rule could say otherwise."""
        return (not self.rules.path and self.identify(request).grants is None
                and self.allows(request, "pull"))

    def check(self, request: Request, action: str, name: Optional[str] = None) -> None:
        """Raises UNAUTHORIZED if the client may not do this, but may with a password; else DENIED,
        with a message that docker prints. Raises TOOMANYREQUESTS."""
        who, needed = self.identify(request), NEEDED[action]
        if self.only_local and needed:
            self._check_local(request, needed > NEEDED["pull"])
        # At /v2/ a client is asked to log in even if anybody may pull: clients that have a password
        # send it only if they are asked. What others do is shown to nobody without a name.
        must_log_in = self.users_file and (action == "login" and who == Who(None, None)
                                           or action == "watch" and who.user is None)
        if not must_log_in and self.allows(request, action, name):
            return
        level = self.rules.level(who.user, name)
        # A user whose level is enough has a token that grants too little.
        if not self.users_file or who.user is not None and level < needed:
            raise self._denied(who.user, level, needed, name)
        problem = {} if who.grants is None else {"error": "insufficient_scope"}
        if name is not None:
            problem["scope"] = self._scope(request, action, name)
        raise self._unauthorized(request, **problem)

    @staticmethod
    def _scope(request: Request, action: str, name: str) -> str:
        """The scopes for which the client should get a token."""
        actions = {"push": "pull,push", "delete": "*"}.get(action, "pull")
        scope = "repository:%s:%s" % (name, actions)
        source = request.get("from") or ""  # of a mount
        return scope + (" repository:%s:pull" % source if NAME.fullmatch(source) else "")

    def _denied(self, user: Optional[str], level: int, needed: int,
                name: Optional[str]) -> RegistryError:
        """A 403 that says what the client may do, and what whoever runs the registry can change."""
        option = "with: tinyreg.py serve --anonymous " + LEVELS[needed]
        if user or self.rules.path:
            option = "with a line in its --rules file: %s %s %s" % (
                name or "**", user or "@anonymous", LEVELS[needed])
        place = self.rules.place_to_push(user) if user and needed == NEEDED["push"] else None
        return RegistryError(
            "DENIED", message="%s may %s%s%s; whoever runs this registry can allow more %s" % (
                user or "clients", IN_WORDS[level], " in " + name if name and name != "**" else "",
                MAY_PUSH + place if place else "", option))

    @staticmethod
    def _check_local(request: Request, writes: bool) -> None:
        """Raises DENIED for a request that is not meant for this machine.

        A browser here lets web pages send us requests: under a name of their own (DNS rebinding),
        and with forms. A proxy here lets other machines connect. By default nginx speaks HTTP/1.0
        to us and sends our own Host; a proxy that hides better looks like a client. Browsers
        always send a Host, so a request without one may read."""
        host = request.header("host")
        is_local = is_this_machine(host) or not host and not writes
        takes = "requests only from its own machine, as localhost"
        if writes:
            origin = request.header("origin", "http://" + host).partition("://")[2]
            forwarded = any(PROXY_HEADER.fullmatch(name) for name in request.headers)
            is_local = (is_local and origin == host and not forwarded
                        and request.version != "1.0")
            takes = ("pushes and deletions only from its own machine, as localhost and through "
                     "no proxy")
        if not is_local:
            raise RegistryError(
                "DENIED", message="this registry takes %s; whoever runs it can let others in with: "
                "tinyreg.py serve --anonymous push (or pull, or admin), or with --users" % takes)

    # For the banner

    def takes_pushes(self) -> bool:
        """Whether somebody may push."""
        has_users = self.users_file or self.client_ca
        return bool(has_users) or self.rules.anonymous >= NEEDED["push"]

    def in_words(self, reach: str, read_only: bool) -> List[str]:
        """Who may do what, in lines; `reach` names the clients that can connect."""
        most = LEVELS.index("pull" if read_only else "admin")
        allowed = IN_WORDS[min(self.rules.default, most)]
        if self.rules.path:
            allowed = "what the rules in %s say" % self.rules.path
        guests = IN_WORDS[min(self.rules.anonymous, most)]
        if any(rule.user == "@anonymous" for rule in self.rules.rules):
            guests = allowed + " of @anonymous"
        elif self.users_file:
            guests += " without a password"
        elif self.client_ca:
            guests += " without a certificate"
        elif self.rules.anonymous < LEVELS.index("admin"):
            guests += " (change it with --anonymous)"
        lines = ["%s may %s" % (reach, guests)] + ["those %s may %s" % (who, allowed) for who in (
            self.users_file and "in " + self.users_file,
            self.client_ca and "with a certificate of " + self.client_ca) if who]
        if read_only:
            lines.append("this registry is read-only")
        return lines

# -------------------------------------------------------------------------------------------------
# 15  Observation
#
# What the people who run a registry see of it: the log, metrics for Prometheus, /live, and
# notifications. The server reports each Exchange to Observation. Processes share memory that was
# mapped before the fork, and files in ROOT/tinyreg. No request fails because it can't be observed,
# except a change whose notification can't be queued.
# -------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """One request and its response, as the log and /live show them."""

    client: str             # its address
    user: str = ""
    method: str = "-"
    target: str = "-"       # without secrets
    route: str = ""         # the name of the handler, if there is one
    name: str = ""          # the repository in the path …
    reference: str = ""     # … and the tag or digest there
    status: int = 0
    received: int = 0       # bytes of the request's body
    sent: int = 0           # bytes of the response's body
    seconds: float = 0.0
    digest: str = ""        # of the blob or manifest in the response
    agent: str = ""         # the client's User-Agent
    refusal: str = ""       # what an error's message says beyond its code


# Log lines

KNOWN_PARAMETERS = ("artifactType|digest|digest-algorithm|from|last|mount|n|ns|platform|q|reference"
                    "|repository|scope|service|tag")
SECRET_PARAMETER = re.compile(r"(?<=[?&])(?!(?:%s)=)([^=&]*=|)[^&]+" % KNOWN_PARAMETERS)


def without_secrets(target: str) -> str:
    """A request's target for the log. The value of a query parameter that no handler reads is left
    out, because it may be a token."""
    target = origin_form(target)
    return SECRET_PARAMETER.sub(r"\1***", target) if "?" in target or "&" in target else target


def timestamp(moment: Optional[float] = None) -> str:
    """A Unix time, or the present, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def as_text(exchange: Exchange) -> str:
    """One line: the fields that each exchange has, then the others with their names."""
    line = "%s %s %s %s %d %d %.1fms" % (
        timestamp(), exchange.client, exchange.method, exchange.target, exchange.status,
        exchange.sent, exchange.seconds * 1000)
    agent = exchange.agent.replace('"', "'")
    for form, value in ((" in=%s", exchange.received), (" user=%s", exchange.user),
                        (" digest=%s", exchange.digest), (' agent="%s"', agent)):
        if value:
            line += form % value
    return line


def json_line(**fields: Any) -> str:
    """These fields and the time, as one line of JSON."""
    return to_json(dict(fields, time=timestamp())).decode().rstrip()


def as_json(exchange: Exchange) -> str:
    """One line with all fields."""
    return json_line(**exchange._replace(seconds=round(exchange.seconds, 6))._asdict())


LOG_FORMATS = {"text": as_text, "json": as_json}

MOUNT = re.compile("[?&]mount=")  # in the target of a POST that begins an upload


# What `--log explain` says of requests: what the client asks -> what a success means to it -> what
# another status means, if neither the refusal nor MEANINGS says it well. Fields of the Exchange
# replace their names in braces. Routes have their own; these are by (method, name of a route), for
# exchanges that have no route.
OTHER_WORDS = {
    ("-", ""): "something that is no HTTP request",
    ("HTTPS", ""): "do you speak HTTPS? (the client tries HTTPS first; that is normal) "
                   "-> 400: no, only HTTP; the client goes on with that, if it may",
    ("", "plain_http"): "{method} {target}, without TLS -> this registry speaks HTTPS, and this is "
                        "how to trust it -> 400: no, this port speaks HTTPS",
    ("TLS", ""): "let us speak TLS -> 499: the client does not like the certificate, and leaves; "
                 "tinyreg.py clients prints how it comes to trust it",
}
NO_WORDS = "{method} {target}"
MOUNT_WORDS = ("may {name} have a blob that another repository has? -> it is not to be had so; "
               "send its bytes to the address in Location -> 201: yes; {digest} is in both now, "
               "and no byte of it was sent")
# What statuses mean, whatever was asked.
MEANINGS = dict(line.split(": ", 1) for line in """\
201: right: it is here now as {digest}
206: here is the part you asked for ({sent})
304: you have it already
400: that is refused, for something is wrong with it
401: who are you? Come back with a user and a password
403: you may not do that
404: that is not here
405: that can't be done
416: that does not follow what is here
429: not so fast
499: the client left before that was said
503: not at the moment; try again
507: there is no room for that: the disk is full
""".splitlines())


# What an answer means for the client, and its colour on a terminal. A client is asked for its
# password, and told what is missing, in the best of pulls and pushes.
COLOURS = {"good": "32", "no": "33", "bad": "31"}


def outcome(exchange: Exchange) -> str:
    """The key in COLOURS of an exchange."""
    expected = exchange.status in (401, 404) or exchange.method == "HTTPS"
    return "good" if exchange.status < 400 else "no" if expected else "bad"


def without_names(exchange: Exchange) -> Exchange:
    """The exchange without what may name other repositories than `name`.

    These are its target's query, the end of a denial, and the path and the refusal if its name was
    not read."""
    path = exchange.target.partition("?")[0]
    if not exchange.name:
        path = "/%s" % path.split("/")[1] if exchange.route and path.startswith("/") else "…"
    query = "?mount=" if MOUNT.search(exchange.target) else ""
    refusal = exchange.refusal.partition(MAY_PUSH)[0] if exchange.name else ""
    return exchange._replace(target=path + query, refusal=refusal)


# The log

def write_log(form: str, *texts: str) -> None:
    """Write texts in this form with one system call, so that the lines of threads and processes
    don't mix."""
    line = form % tuple(map(harmless, texts)) + "\n"
    with contextlib.suppress(OSError):  # requests are answered even if the log can't be written
        os.write(2, line.encode("utf-8", "replace"))


def open_log_file(path: str) -> None:
    """Make this file standard error, so that tracebacks go there as well. Raises OSError.

    A second call opens the path anew, after logrotate has renamed the file."""
    with open(path, "ab", opener=functools.partial(os.open, mode=0o640)) as file:
        os.dup2(file.fileno(), 2)


class LogHandler(logging.Handler):
    """Writes warnings and errors as lines like those of the requests, and a traceback indented
    below its line. In the style "command" a line looks like a command's errors."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style

    def emit(self, record: logging.LogRecord) -> None:
        level, message, trace = record.levelname, record.getMessage(), []
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info).splitlines()
        if self.style == "json":
            return write_log("%s", json_line(level=level.lower(), message=message, trace=trace))
        start = "tinyreg:" if self.style == "command" else "%s %s" % (timestamp(), level)
        write_log("%s %s", start, message)
        for line in trace:
            write_log("    %s", line)


def start_logging(style: str) -> None:
    """Write warnings and errors to the log, in the style "text", "json", "explain" or "command". A
    later call changes the style."""
    logger.handlers[:] = [LogHandler(style)]


# Metrics

STATUSES = [status.value for status in http.HTTPStatus if status >= 200] + ["other"]
LATENCIES = (0.0005, 0.002, 0.01, 0.05, 0.25, 1, 5, 30)  # seconds
# The name without tinyreg_, the type, and what it is.
METRICS = """\
requests_total counter Requests, by method, route (the handler's name) and status
request_seconds histogram Time from a request's head to the end of its answer
received_bytes_total counter Bytes of request bodies
sent_bytes_total counter Bytes of answers' bodies
cache_hits_total counter Answers given from memory
events_dropped_total counter Notifications lost because an endpoint's queue was full
watchers gauge Browsers that look at /live
connections gauge Connections of clients
notifications_waiting gauge Notifications not yet delivered, by endpoint
store_bytes gauge Bytes of all blobs
store_blobs gauge Blobs and manifests stored
store_unlinked_bytes gauge Bytes of blobs that no repository has, which gc frees
store_repositories gauge Repositories
store_uploads gauge Upload sessions open
store_measured_seconds gauge When the store was measured, as Unix time
store_free_bytes gauge Free space on the store's disk
last_gc_seconds gauge When garbage was collected last, as Unix time
last_gc_freed_bytes gauge Bytes that it freed
last_verify_seconds gauge When everything was read again last (tinyreg.py verify), as Unix time
last_verify_findings gauge What was damaged or missing then
last_verify_read_bytes gauge Bytes that it read
"""


class Metrics:
    """Numbers that several processes count, in shared memory that is made before the fork.

    Each process has a row of cells, so that none waits for another. A cell has the name that
    Prometheus gives it. Rows are never cleared: a worker that replaces a dead one counts on."""

    def __init__(self, routes: Iterable[Tuple[str, str]], processes: int = 1) -> None:
        names = ["received_bytes_total", "sent_bytes_total", "cache_hits_total",
                 "events_dropped_total", "watchers", "connections"]
        self.blocks = {}  # {(method, route): the first of its cells}
        for method, route in sorted(set(routes)) + [("other", "none")]:
            self.blocks[method, route] = len(names)
            labels = 'method="%s",route="%s"' % (method, route)
            names += ['requests_total{%s,status="%s"}' % (labels, status) for status in STATUSES]
            names += ['request_seconds_bucket{%s,le="%s"}' % (labels, bound)
                      for bound in LATENCIES + ("+Inf",)]
            names += ["request_seconds_%s{%s}" % (part, labels) for part in ("count", "sum")]
        self.statuses = {status: cell for cell, status in enumerate(STATUSES)}
        self.cells = {name: cell for cell, name in enumerate(names)}
        self.numbers = memoryview(mmap.mmap(-1, 8 * len(names) * processes)).cast("d")
        self.row = 0  # the first cell of this process
        self.mutex = threading.Lock()

    def start(self, process: int) -> None:
        """Count in the row of this process from now on."""
        self.row = process * len(self.cells)
        # The clients of a worker before us have lost their connections.
        for name in ("watchers", "connections"):
            self.numbers[self.row + self.cells[name]] = 0

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a cell."""
        with self.mutex:
            self.numbers[self.row + self.cells[name]] += amount

    def total(self, name: str) -> float:
        """The sum of a cell over all processes."""
        return sum(self.numbers[self.cells[name]::len(self.cells)])

    def excess(self, name: str) -> float:
        """By how much this process's cell is above the lowest of all processes."""
        cell = self.cells[name]
        return self.numbers[self.row + cell] - min(self.numbers[cell::len(self.cells)])

    def count(self, exchange: Exchange, cached: bool = False) -> None:
        """Add one exchange; `cached` says that its response came from memory."""
        block = self.blocks.get((exchange.method, exchange.route), self.blocks["other", "none"])
        block += self.row
        status = self.statuses.get(exchange.status, len(STATUSES) - 1)
        buckets = block + len(STATUSES)
        count = buckets + len(LATENCIES) + 1
        with self.mutex:
            self.numbers[self.row] += exchange.received
            self.numbers[self.row + 1] += exchange.sent
            self.numbers[self.row + 2] += cached
            self.numbers[block + status] += 1
            self.numbers[buckets + bisect.bisect_left(LATENCIES, exchange.seconds)] += 1
            self.numbers[count] += 1
            self.numbers[count + 1] += exchange.seconds

    def _samples(self) -> Iterator[str]:
        """The name and the number of each cell, but for routes that have no requests."""
        below = 0.0
        for name in self.cells:
            number = self.total(name)
            # A bucket of Prometheus includes the faster ones before it.
            below = below + number if "_bucket{" in name else 0.0
            count = re.sub("_bucket(.*),le=.*", r"_count\1}", name)
            if "{" not in name or self.total(count):  # all buckets of a histogram, or none
                yield "%s %.15g" % (name, below or number)

    def text(self, gauges: Iterable[str]) -> str:
        """All metrics and the further gauges, each a name and a number, in Prometheus' format."""
        samples: Dict[str, List[str]] = collections.defaultdict(list)
        for sample in itertools.chain(self._samples(), gauges):
            metric = re.sub(r"(_bucket|_count|_sum)?(\{.*)? .*", "", sample)
            samples[metric].append("tinyreg_" + sample)
        lines = []
        for metric, kind, explanation in (line.split(" ", 2) for line in METRICS.splitlines()):
            if metric in samples:
                lines += ["# HELP tinyreg_%s %s" % (metric, explanation),
                          "# TYPE tinyreg_%s %s" % (metric, kind)] + samples[metric]
        return "\n".join(lines + [""])


# Notifications

EVENT_TYPE = "application/vnd.docker.distribution.events.v2+json"


ENDPOINT_SETTINGS = {"actions": "push,mount,delete", "repositories": "**", "secret": "",
                     "headers": ""}


class Endpoint:
    """A URL that takes notifications: URL[#SETTING=VALUE&…], with the settings
    actions=push,delete,mount,pull  repositories=GLOB,GLOB  secret=FILE  headers=FILE.

    They stand in the fragment, because no client sends it. Raises CommandError."""

    def __init__(self, text: str) -> None:
        self.url, _, fragment = text.partition("#")
        settings = dict(ENDPOINT_SETTINGS)
        settings.update(urllib.parse.parse_qsl(fragment, keep_blank_values=True))
        try:
            self.parts = urllib.parse.urlsplit(self.url)
            if (self.parts.scheme not in ("http", "https") or not self.parts.hostname
                    or "@" in self.parts.netloc or self.parts.port == 0):
                raise ValueError
        except ValueError:  # also if the port is no number, or the address is no address
            raise CommandError("write http://HOST[:PORT]/PATH; a password goes as Authorization "
                               "into headers=FILE")
        self.key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        # For logs; without the path, which may be secret.
        self.shown = "%s://%s (%s)" % (self.parts.scheme, self.parts.netloc, self.key[:8])
        self.actions = settings["actions"].split(",")
        self.globs = [parse_glob(glob) for glob in settings["repositories"].split(",")]
        self.secret, self.headers = settings["secret"], settings["headers"]
        wrong = (set(settings) - set(ENDPOINT_SETTINGS)
                 | set(self.actions) - {"push", "pull", "mount", "delete"})
        if wrong:
            raise CommandError("%s: %s is none of actions=push,mount,delete,pull  "
                               "repositories=GLOB  secret=FILE  headers=FILE"
                               % (self.shown, ", ".join(sorted(wrong))))
        for path in filter(None, (self.secret, self.headers)):
            if not os.access(path, os.R_OK):
                raise CommandError("%s: can't read %s" % (self.shown, path))

    def wants(self, action: str, name: str) -> bool:
        """Whether it takes notifications of this action in this repository."""
        return action in self.actions and any(glob.fullmatch(name) for glob in self.globs)

    def deliver(self, body: bytes) -> None:
        """POST a notification. Raises OSError, ValueError, HTTPException if it is not taken."""
        headers = {"Content-Type": EVENT_TYPE, "User-Agent": "tinyreg/" + __version__}
        if self.headers:
            with open(self.headers) as file:
                headers.update(re.findall(r"^([^\s:]+):[ \t]*(.*?)[ \t]*$", file.read(),
                                          re.MULTILINE))
        if self.secret:
            with open(self.secret, "rb") as key:
                signature = hmac.new(key.read().strip(), body, "sha256").hexdigest()
            # GitHub's name and form, which many receivers can check.
            headers["X-Hub-Signature-256"] = "sha256=" + signature
        kind = (http.client.HTTPSConnection if self.parts.scheme == "https"
                else http.client.HTTPConnection)
        target = urllib.request.Request(self.url).selector  # its path and query
        with contextlib.closing(kind(self.parts.netloc, timeout=NOTIFY_LIMIT)) as connection:
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
        if status >= 400:  # Distribution counts 2xx and 3xx as delivered
            raise OSError("it answered %d" % status)


class EventQueue:
    """The notifications that wait for one endpoint, and the thread that delivers them.

    Each is a file: it has the body to send, and its name is the time when it was queued. An event
    is queued before its request is answered, stays through kill -9 and restarts, and is delivered
    in order, at least once. If more than MAX_EVENTS wait, the oldest are dropped, logged and
    counted. All processes queue, those of other hosts too. The process that holds the lock
    KEY.sender delivers; if it dies, the next one does."""

    def __init__(self, folder: str, endpoint: Endpoint, metrics: Metrics) -> None:
        self.files = Files(os.path.join(folder, "scratch"))
        self.folder = os.path.join(folder, "notify", endpoint.key)
        self.endpoint = endpoint
        self.metrics = metrics
        make_directories(self.folder)

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, str(number))

    def numbers(self) -> List[int]:
        """The numbers of the notifications that wait, the oldest first. Raises OSError."""
        return sorted(int(name) for name in os.listdir(self.folder)
                      if re.fullmatch("[0-9]+", name))

    def put(self, event: Dict[str, Any]) -> None:
        """Queue an event, durably. Raises OSError."""
        body = json.dumps({"events": [event]}, indent=3).encode("ascii")
        last = self.folder + ".last"
        with alone(self.folder + ".lock"), open(last, "ab"):
            # The file's mtime is the last number: the order holds even if the clock is set back.
            number = max(int(time.time() * 1e9), os.stat(last).st_mtime_ns + 1)
            os.utime(last, ns=(number, number))
            self.files.write(self._path(number), body)

    def start(self) -> None:
        """Deliver from now on; to be called in each process that serves."""
        threading.Thread(target=self.deliver, daemon=True).start()

    def deliver(self) -> None:
        """Deliver for ever, once no other process does. Between failures it waits for 1, 2, 4 …
        60 seconds."""
        with alone(self.folder + ".sender"):
            delay = 0
            while True:
                try:
                    for number in self._next_numbers():
                        self.endpoint.deliver(read_file(self._path(number)) or b"")
                        os.unlink(self._path(number))
                        if delay:
                            logger.warning("%s takes notifications again", self.endpoint.shown)
                        delay = 0
                except (OSError, ValueError, http.client.HTTPException) as error:
                    # The endpoint is away, or refuses; or the disk failed. Try again later.
                    if not delay:
                        logger.warning("%s does not take notifications: %s; they are kept and "
                                       "tried again", self.endpoint.shown,
                                       error or type(error).__name__)
                    delay = min(2 * delay or 1, 60)
                time.sleep(delay or NOTIFY_POLL)

    def _next_numbers(self) -> List[int]:
        """The next notifications to deliver: few, so that the length of the queue is checked often.
        Drops the oldest if too many wait. Raises OSError."""
        numbers = self.numbers()
        for number in numbers[:-MAX_EVENTS]:
            os.unlink(self._path(number))
            self.metrics.add("events_dropped_total")
            logger.error("too many notifications wait for %s: the oldest was dropped",
                         self.endpoint.shown)
        return numbers[-MAX_EVENTS:][:100]


class Live:
    """Shows the exchanges of all processes to the browsers that look at /live, by way of a file. It
    is written only while somebody looks."""

    def __init__(self, folder: str, metrics: Metrics) -> None:
        # One for each host, because hosts would write over each other's lines.
        self.path = os.path.join(folder, "live." + socket.gethostname())
        self.metrics = metrics

    def show(self, exchange: Exchange) -> None:
        """Write an exchange for those who look."""
        if self.metrics.total("watchers"):
            # The disk may be full; then they miss an exchange.
            with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
                if file.tell() > MAX_LIVE:
                    file.truncate(0)
                file.write(to_json(exchange))

    def watch(self) -> Iterator[Optional[Exchange]]:
        """Yield exchanges as they happen, for ever; and None five times a second while nothing
        happens. Raises OSError."""
        self.metrics.add("watchers")
        try:
            with open(self.path, "a+b") as file:
                while True:
                    if os.fstat(file.fileno()).st_size < file.tell():
                        file.seek(0)  # the file has begun anew
                    line = file.readline()
                    with contextlib.suppress(ValueError):  # a line that the new begin has cut
                        yield Exchange(*json.loads(line.decode())) if line else None
                    if not line:
                        time.sleep(0.2)
        finally:
            self.metrics.add("watchers", -1)


class Observation:
    """Tells all observers of each exchange. It is made before the fork, and started in each
    process.

    `folder` is ROOT/tinyreg; archives have none, and then there is no /live and no notification.
    `routes` has the words of each (method, name of a route). Raises CommandError for an endpoint
    that is given twice, because both would have one queue."""

    def __init__(self, folder: Optional[str], style: str, routes: Dict[Tuple[str, str], str],
                 endpoints: Sequence[Endpoint] = (), processes: int = 1) -> None:
        self.style = style
        self.metrics_open = False  # whether everyone may read the metrics
        self.folder = folder
        self.words = dict(OTHER_WORDS)
        self.words.update(routes)
        self.format = LOG_FORMATS.get(style, self.explain)
        self.metrics = Metrics(routes, processes)
        self.last_client = mmap.mmap(-1, 8)  # whose block is the last one on the terminal
        # What notifications name as their sender.
        self.source = {"addr": socket.gethostname(), "instanceID": str(uuid.uuid4())}
        self.live = Live(folder, self.metrics) if folder else None
        self.queues = [EventQueue(folder, endpoint, self.metrics)
                       for endpoint in endpoints if folder]
        keys = [endpoint.key for endpoint in endpoints]
        for endpoint in endpoints:
            if keys.count(endpoint.key) > 1:
                raise CommandError("--notify: %s is there twice; say once all that it is to hear of"
                                   % endpoint.shown)

    def start(self, process: int) -> None:
        """Begin in the process of this number."""
        self.metrics.start(process)
        for queue in self.queues:
            queue.start()

    def _in_words(self, exchange: Exchange) -> Tuple[str, str]:
        """Who asks; and what, and what the response tells the client."""
        words = (self.words.get((exchange.method, exchange.route))
                 or self.words.get(("", exchange.route), NO_WORDS))
        if exchange.method == "POST" and MOUNT.search(exchange.target):
            words = MOUNT_WORDS
        question = words.partition(" -> ")[0]
        answers = dict(re.findall("-> (?:([0-9]{3}): )?(.*?)(?= ->|$)", words))
        status = str(exchange.status)
        success = answers.get("", "here it is") if exchange.status < 400 else "that went wrong"
        answer = (answers.get(status) or exchange.refusal and "{refusal}"
                  or MEANINGS.get(status) or success)
        reference = shorten(exchange.reference)
        values = dict(exchange._asdict(), sent=in_units(exchange.sent),
                      received=in_units(exchange.received),
                      reference=reference, digest=shorten(exchange.digest),
                      image=exchange.name + ("@" if ":" in reference else ":") + reference)
        who = exchange.agent.split(" ")[0] or "someone"
        who += " (%s)" % exchange.user if exchange.user else ""
        return "%s at %s" % (who, exchange.client), "%s -> %d: %s" % (
            question.format(**values), exchange.status, answer.format(**values))

    def explain(self, exchange: Exchange) -> str:
        """The exchange in words, as --log explain and /live show it."""
        return time.strftime("%H:%M:%S ") + ": ".join(self._in_words(exchange))

    def show_on_terminal(self, exchange: Exchange) -> None:
        """Write the exchange in words, and above it who asks, unless that was the last one, too."""
        who, line = self._in_words(exchange)
        form, texts = "  \x1b[%sm%s %s\x1b[0m", [
            COLOURS[outcome(exchange)], time.strftime("%H:%M:%S"), line]
        key = struct.pack("q", hash(who))  # all processes share Python's hash
        if self.last_client[:] != key:
            form, texts = "\x1b[1m%s\x1b[0m\n" + form, [who] + texts
        self.last_client[:] = key
        write_log(form, *texts)

    def record(self, exchange: Exchange, cached: bool = False) -> None:
        """Tell all observers of an exchange; `cached` says that its response came from memory."""
        self.metrics.count(exchange, cached)
        if self.live:
            self.live.show(exchange)
        if self.style == "explain" and os.isatty(2):
            self.show_on_terminal(exchange)
        elif self.style != "off":
            write_log("%s", self.format(exchange))

    def gauges(self) -> Iterator[str]:
        """Metrics that are looked up, not counted: their names and numbers. Raises OSError."""
        for queue in self.queues:
            name = re.sub(r'[\\"]', "_", harmless(queue.endpoint.shown))
            yield 'notifications_waiting{endpoint="%s"} %d' % (name, len(queue.numbers()))
        for task in ("gc", "verify") if self.folder else ():
            path = os.path.join(self.folder or "", task)
            # There was no run yet, or one of an earlier version.
            with contextlib.suppress(OSError, ValueError):
                numbers = dict(load_json(read_file(path) or b""), seconds=os.stat(path).st_mtime)
                for key, number in numbers.items():
                    yield "last_%s_%s %.15g" % (task, key, number)

# -------------------------------------------------------------------------------------------------
# 16  API
#
# The endpoints of distribution-spec: handlers, each from a Request to a Response, and the table of
# routes that finds them. A handler writes nothing itself, so it runs in a test without a socket,
# and a late failure can still choose the status. What a handler raises becomes a Response in
# dispatch(). Locations are relative, so they are right behind any proxy; oras and crane need that.
# -------------------------------------------------------------------------------------------------

Headers = List[Tuple[str, str]]


class Stream:
    """A body that is made while it is sent. `write_to(send)` calls `send` with its blocks; an empty
    block only asks whether client and server still want the rest. `length` is in bytes, None if
    that is unknown."""

    file = None

    def __init__(self, write_to: Callable[[Callable[[bytes], None]], Any],
                 length: Optional[int] = None) -> None:
        self.write_to = write_to
        self.length = length

    def close(self) -> None:
        """There is nothing to close."""


class Response:
    """A status, headers and a body: bytes, or a Blob or Stream, which the server closes."""

    def __init__(self, status: int, headers: Iterable[Tuple[str, str]] = (),
                 body: Union[bytes, Blob, Stream] = b"") -> None:
        self.status = status
        self.headers = list(headers)
        self.body = body
        self.reason: Optional[str] = None  # for the status line, if not HTTP's own
        self.error = ""    # the message of an error …
        self.refusal = ""  # … if it says more than its code
        # Whether the same request may get it again while the registry has not changed.
        self.is_repeatable = False

    @property
    def length(self) -> Optional[int]:
        """The bytes of the body; None if that is unknown."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.length

    @classmethod
    def of_json(cls, value: Any, headers: Iterable[Tuple[str, str]] = (),
                content_type: str = JSON) -> "Response":
        return cls(200, [("Content-Type", content_type)] + list(headers), to_json(value))

    @classmethod
    def of_text(cls, text: str, status: int = 200) -> "Response":
        return cls(status, [("Content-Type", "text/plain; charset=utf-8")],
                   text.encode("utf-8", "replace"))

    @classmethod
    def of_error(cls, error: RegistryError) -> "Response":
        response = cls(error.status, [("Content-Type", JSON)] + error.headers, error.body())
        response.error = error.message[:300]
        if error.message != ERRORS[error.code].message:
            response.refusal = response.error
        if error.status >= 500:  # docker, podman and skopeo show the status line of these, no body
            response.reason = re.sub("[^ -~]", "?", error.message[:300])
        return response


# What several handlers need

def etag_matches(request: Request, digest: Digest) -> bool:
    """Whether If-None-Match names this digest's ETag (RFC 9110, 13.1.2)."""
    header = request.header("if-none-match")
    return header.strip() == "*" or '"%s"' % digest in header


def content_headers(digest: Digest, content_type: str) -> Headers:
    """The headers of each response with a blob or manifest.

    The digest has the algorithm that the client asked with, because containerd compares the texts.
    A type that no header may carry (another program stored it) is replaced by OCTET_STREAM."""
    if not re.fullmatch("[!-~]([ -~]*[!-~])?", content_type):
        content_type = OCTET_STREAM
    return [("Content-Type", content_type), ("Docker-Content-Digest", digest),
            ("ETag", '"%s"' % digest)]


def take_page(entries: Iterable[Any], count: int) -> Tuple[List[Any], bool]:
    """The first `count` entries, and whether there are more."""
    page = list(itertools.islice(entries, count + 1))
    return page[:count], len(page) > count


def asked_count(request: Request, limit: int) -> int:
    """How many entries the client wants at once, at most `limit`. Raises UNSUPPORTED."""
    count = request.get("n")
    return limit if count is None else min(parse_count(count), limit)


def next_link(path: str, **query: Any) -> Headers:
    """A Link header to the next page (RFC 8288), relative."""
    return [("Link", '<%s?%s>; rel="next"' % (path, urllib.parse.urlencode(query)))]


def list_page(key: str, path: str, entries: Iterable[str], count: int, **fields: str) -> Response:
    """The first `count` entries as JSON, under `key`, and a link to the next page if there are
    more."""
    page, has_more = take_page(entries, count)
    link = next_link(path, n=count, last=page[-1]) if has_more and page else []
    return Response.of_json(dict(fields, **{key: page}), link)


# Handlers: determining support, content discovery

def get_base(registry: Registry, request: Request) -> Response:
    """That this is a registry (end-1): docker login and each client's first request ask that."""
    return Response.of_json({})


def get_catalog(registry: Registry, request: Request) -> Response:
    """The names of the repositories that the client may pull, in pages. The specification does not
    have it, but Distribution does, and crane uses it."""
    names = (name for name in registry.repositories(request.get("last", ""))
             if request.access.lists(request, name))
    return list_page("repositories", "/v2/_catalog", names, asked_count(request, PAGE_SIZE))


def get_token(registry: Registry, request: Request) -> Response:
    """A token for a client that was told to use Bearer (Distribution's token protocol). Raises
    UNAUTHORIZED."""
    token = request.access.make_token(request, request.query.get("scope", ()))
    return Response.of_json({"token": token, "access_token": token, "expires_in": TOKEN_LIFE},
                            [("Cache-Control", "no-store")])


def get_tags(registry: Registry, request: Request, name: str) -> Response:
    """The tags of a repository (end-8a, end-8b): all of them, unless the client asks for pages.
    Raises NAME_UNKNOWN."""
    return list_page("tags", "/v2/%s/tags/list" % name,
                     registry.tags(name, request.get("last", "")),
                     asked_count(request, sys.maxsize - 1), name=name)


def get_referrers(registry: Registry, request: Request, name: str, digest: Digest) -> Response:
    """The manifests that are about another (end-12a, end-12b) as an index, in pages that stay below
    the size of a manifest.

    A repository that is not there has none: oras asks before its first push, and would take a 404
    for "unsupported"."""
    count, artifact_type = asked_count(request, PAGE_SIZE), request.get("artifactType")
    query = {} if artifact_type is None else {"artifactType": artifact_type}
    headers = [("OCI-Filters-Applied", "artifactType")] if query else []
    entries: List[Dict[str, Any]] = []
    size = 0
    for manifest in registry.referrers(name, digest, request.get("last", "")):
        entry = manifest.referrer()
        if query and entry.get("artifactType") != artifact_type:
            continue
        size += len(to_json(entry))
        if len(entries) == count or entries and size > MAX_MANIFEST - 1000:
            if entries:
                headers += next_link("/v2/%s/referrers/%s" % (name, digest), n=count,
                                     last=entries[-1]["digest"], **query)
            break  # and read no other: annotations can fill the memory
        entries.append(entry)
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    # The type has no charset, because oras compares the whole header.
    return Response.of_json(index, headers, OCI_INDEX)


# Handlers: manifests

def get_manifest(registry: Registry, request: Request, name: str, reference: Reference) -> Response:
    """A manifest as it was pushed, whatever Accept says (end-3). Raises NAME_UNKNOWN,
    MANIFEST_UNKNOWN."""
    digest = resolve_reference(registry, name, reference)
    manifest = registry.manifest(name, digest)
    headers = content_headers(digest, manifest.media_type)
    if etag_matches(request, digest):
        return Response(304, headers)
    return Response(200, headers, manifest.content)


def read_manifest_body(request: Request) -> bytes:
    """The whole body. Raises MANIFEST_INVALID with status 413 for more than MAX_MANIFEST."""
    content, block = bytearray(), memoryview(bytearray(COPY_BUFFER))
    for count in iter(lambda: request.body.readinto(block), 0):
        content += block[:count]
        if len(content) > MAX_MANIFEST:
            raise RegistryError("MANIFEST_INVALID", status=413,
                                message="a manifest may have at most 4 MiB")
    return bytes(content)


def mount_missing(registry: Registry, request: Request, name: str, digests: Iterable[str]) -> bool:
    """Mount blobs from the other repositories that a read of this name may mean. A HEAD there told
    the client that it need not send them. Returns whether all are here now."""
    for other in set(names_to_try(name, request.get("ns"))) - {name}:
        if request.allows("pull", other):
            digests = [digest for digest in digests
                       if not registry.mount(name, Digest(digest), other)]
    return not digests


def put_manifest(registry: Registry, request: Request, name: str, reference: Reference) -> Response:
    """Store a manifest under a tag (end-7a), or under its digest and any tags (end-7b).

    Raises MANIFEST_INVALID, MANIFEST_BLOB_UNKNOWN, DIGEST_INVALID."""
    tags, digest = [reference], None
    if isinstance(reference, Digest):
        tags, digest = [parse_tag(tag) for tag in request.query.get("tag", ())], reference
    manifest = parse_manifest(read_manifest_body(request), request.header("content-type"), digest)
    put = functools.partial(registry.put_manifest, name, manifest, tags, request.check_wanted)
    try:
        put()
    except BlobsMissing as error:
        if not mount_missing(registry, request, name, error.details):
            raise
        put()
    headers = [("Location", "/v2/%s/manifests/%s" % (name, manifest.digest)),
               ("Docker-Content-Digest", manifest.digest)]
    if manifest.subject:
        headers.append(("OCI-Subject", manifest.subject))
    if digest and tags:
        headers.append(("OCI-Tag", ", ".join(tags)))
    return Response(201, headers)


def delete_manifest(registry: Registry, request: Request, name: str,
                    reference: Reference) -> Response:
    """Delete a tag, or a manifest with all tags that point to it (end-9). Raises NAME_UNKNOWN,
    MANIFEST_UNKNOWN."""
    delete_reference(registry, name, reference)
    return Response(202)


# Handlers: blobs

def get_blob(registry: Registry, request: Request, name: str, digest: Digest) -> Response:
    """A blob, or the one range of it that the client asks for (end-2). Raises NAME_UNKNOWN,
    BLOB_UNKNOWN, RANGE_INVALID."""
    headers = content_headers(digest, OCTET_STREAM)
    headers.append(("Accept-Ranges", "bytes"))
    etag = '"%s"' % digest
    has_range = request.method == "GET" and request.header("if-range", etag) == etag
    blob = registry.open_blob(name, digest)
    if etag_matches(request, digest):
        blob.close()
        return Response(304, headers)
    try:
        part = parse_range(request.header("range"), blob.length) if has_range else None
    except RangeInvalid:
        blob.close()
        raise
    if part is None:
        return Response(200, headers, blob)
    start, length = part
    last = start + length - 1
    headers.append(("Content-Range", "bytes %d-%d/%d" % (start, last, blob.length)))
    return Response(206, headers, blob.part(start, length))


def get_file(registry: Registry, request: Request, name: str,
             reference: Reference, file: str) -> Response:
    """A file of an artifact, as get_blob() gives a blob; else, of no or another name, a list of the
    names that there are. A browser is to keep the file, and not to show it: it may be a page with
    scripts. Raises NAME_UNKNOWN, MANIFEST_UNKNOWN, MANIFEST_INVALID, BLOB_UNKNOWN,
    RANGE_INVALID."""
    manifest = registry.manifest(name, resolve_reference(registry, name, reference))
    files, title = files_in(registry, name, manifest), file[1:]
    if title not in files:
        return Response.of_text("".join(title + "\n" for title in files), 404 if title else 200)
    response = get_blob(registry, request, name, files[title].digest)
    response.headers.append(("Content-Disposition", "attachment; filename*=UTF-8''"
                             + urllib.parse.quote(os.path.basename(title))))
    return response


def delete_blob(registry: Registry, request: Request, name: str, digest: Digest) -> Response:
    """Take a blob from a repository (end-10). Raises NAME_UNKNOWN, BLOB_UNKNOWN."""
    registry.delete_blob(name, digest)
    return Response(202)


# Handlers: uploads

def upload_headers(session: UploadSession) -> Headers:
    """Where an upload stands. Without bytes the Range is 0-0: docker's client can't read 0--1."""
    location = "/v2/%s/blobs/uploads/%s" % (session.name, session.id)
    if session.state:
        location += "?state=" + session.state
    return [("Location", location), ("Range", "0-%d" % max(session.offset - 1, 0)),
            ("Docker-Upload-UUID", session.id)]


def created_blob(name: str, digest: str) -> Response:
    return Response(201, [("Location", "/v2/%s/blobs/%s" % (name, digest)),
                          ("Docker-Content-Digest", digest)])


def append_body(session: UploadSession, request: Request) -> None:
    """Append the request's body to an upload, at the place that its Content-Range names, if it has
    one.

    Raises RANGE_INVALID, with the headers that tell the client where to go on; SIZE_INVALID."""
    first: Optional[int] = None
    end: Optional[int] = None
    content_range, length = request.header("content-range"), request.header("content-length")
    if content_range:
        first, last = parse_content_range(content_range)
        end = last + 1
        if length and int(length) != end - first:
            raise RegistryError("SIZE_INVALID",
                                {"Content-Range": content_range, "Content-Length": length})
    try:
        session.append(request.body, first)
    except RangeInvalid as error:
        error.headers += upload_headers(session)
        raise
    if end not in (None, session.offset):
        raise RegistryError("SIZE_INVALID",
                            {"Content-Range": content_range, "offset": session.offset})


def try_mount(registry: Registry, request: Request, name: str, digest: Digest) -> bool:
    """Mount a blob from the repository in `from`; whether that has it.

    Without `from`, any repository will do if the client may pull from all. A blob that the client
    may not pull counts as missing, so the client has to upload it. Raises NAME_INVALID."""
    source = request.get("from") or None
    if source:
        may_pull = request.allows("pull", parse_name(source))
    else:
        may_pull = request.access.pulls_everything(request)
    return may_pull and registry.mount(name, digest, source)


def start_upload(registry: Registry, request: Request, name: str) -> Response:
    """Mount a blob (end-11), or take it whole (end-4b), or begin an upload (end-4a, end-4c).

    Raises DIGEST_INVALID, NAME_INVALID."""
    mount, digest = request.get("mount"), request.get("digest")
    if mount is not None and try_mount(registry, request, name, parse_digest(mount)):
        return created_blob(name, mount)
    if digest is None:
        algorithm = parse_algorithm(request.get("digest-algorithm", "sha256"))
        session = registry.start_upload(name, algorithm)
        request.access.uploads.count(request.client, session, registry.has_upload)
        return Response(202, upload_headers(session))
    digest = parse_digest(digest)
    session = registry.start_upload(name, digest.algorithm)
    try:
        append_body(session, request)
    except BaseException:  # whatever it was: the client knows no Location to go on with
        session.cancel()
        raise
    session.commit(digest)
    return created_blob(name, digest)


def get_upload(registry: Registry, request: Request, name: str, session_id: str) -> Response:
    """How far an upload is (end-13). Raises BLOB_UPLOAD_UNKNOWN."""
    return Response(204, upload_headers(registry.find_upload(name, session_id)))


def carried_session(registry: Registry, request: Request, name: str,
                    session_id: str) -> UploadSession:
    """An upload session, with the state that the client carries. Raises BLOB_UPLOAD_UNKNOWN."""
    session = registry.find_upload(name, session_id)
    state = request.get("state", "")
    # Checked, because upload_headers() may send it back.
    session.state = state if re.fullmatch("[0-9]{1,18}-[0-9a-f]{64}", state) else ""
    return session


def append_to_upload(registry: Registry, request: Request, name: str, session_id: str) -> Response:
    """Take a chunk (end-5). Raises BLOB_UPLOAD_UNKNOWN, RANGE_INVALID, SIZE_INVALID."""
    session = carried_session(registry, request, name, session_id)
    append_body(session, request)
    return Response(202, upload_headers(session))


def finish_upload(registry: Registry, request: Request, name: str, session_id: str) -> Response:
    """Take the last chunk, if there is one, and make the upload a blob (end-6).

    Raises BLOB_UPLOAD_UNKNOWN, RANGE_INVALID, SIZE_INVALID, DIGEST_INVALID."""
    session = carried_session(registry, request, name, session_id)
    digest = parse_digest(request.get("digest") or "")
    append_body(session, request)
    session.commit(digest)
    return created_blob(name, digest)


def cancel_upload(registry: Registry, request: Request, name: str, session_id: str) -> Response:
    """Forget an upload (end-14). Raises BLOB_UPLOAD_UNKNOWN."""
    registry.find_upload(name, session_id).cancel()
    return Response(204)


# Routes

# The {placeholders} of a path match loosely, and these parsers decide: so /v2/Bad/tags/list is
# NAME_INVALID and not an unknown path.
PARSERS: Dict[str, Callable[[str], Any]] = {
    "name": parse_name, "reference": parse_reference, "digest": parse_digest,
    "session_id": parse_session_id, "client": str, "file": str,
}


class Route(NamedTuple):
    """One endpoint, and all that the rest of the program knows about it.

    `line` has the methods and the path, separated by spaces. In the path, {name} may contain
    slashes; any other {placeholder} is one component, and PARSERS checks it. `action` is what
    Access must allow. `words` are for `--log explain`; `events` names the event that notifications
    tell of, by the status of the response."""

    line: str
    action: str
    handler: Callable[..., Response]
    words: str = NO_WORDS
    events: Dict[int, str] = {}

    @property
    def name(self) -> str:
        """What logs and metrics call it."""
        return self.handler.__name__


def compile_routes(routes: Iterable[Route]) -> List[Tuple[Pattern, Dict[str, Route]]]:
    """The routes of each path, by method, with a pattern for that path; in the order in which
    dispatch tries them."""
    paths: Dict[str, Dict[str, Route]] = {}
    for route in routes:
        *methods, path = route.line.split()
        pattern = path.replace("{name}", "(?P<name>.+?)")
        pattern = re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern)
        paths.setdefault(pattern, {}).update(dict.fromkeys(methods, route))
    return [(re.compile(pattern), by_method) for pattern, by_method in paths.items()]


# The events of notifications. HEAD makes none: its client has the content, or asks for it again.
PULL, PUSH, DELETE = {200: "pull", 206: "pull"}, {201: "push"}, {202: "delete"}

ROUTES = compile_routes([
    Route("GET HEAD /v2/?", "login", get_base,  # end-1 in distribution-spec
          "are you a registry? -> yes, and you may go on"),
    Route("GET HEAD /v2/_catalog", "pull", get_catalog,
          "which repositories are there? -> here are their names"),
    Route("GET HEAD " + TOKEN_PATH, "pull", get_token,
          "a token, please, which stands for the password for some minutes"),
    Route("GET HEAD /v2/{name}/tags/list", "pull", get_tags,  # end-8
          "which tags has {name}? -> here they are: names, each for one manifest"),
    Route("GET HEAD /v2/{name}/referrers/{digest}", "pull", get_referrers,  # end-12
          "is anything about {reference}: a signature, an SBOM? -> here is the list; it may be "
          "empty"),
    Route("GET /v2/{name}/manifests/{reference}", "pull", get_manifest,  # end-3
          "the manifest {image}, please: the list of what the image consists of "
          "-> here it is ({sent}); next come the blobs on it that the client lacks", PULL),
    Route("HEAD /v2/{name}/manifests/{reference}", "pull", get_manifest,  # end-3
          "which manifest is {image} at the moment? -> {digest}; a client that has it stops here"),
    Route("PUT /v2/{name}/manifests/{reference}", "push", put_manifest,  # end-7
          "here is the manifest of {image}; from now on let it be pulled", PUSH),
    Route("DELETE /v2/{name}/manifests/{reference}", "delete", delete_manifest,  # end-9
          "delete {image} -> done; the blobs stay until garbage is collected", DELETE),
    Route("POST /v2/{name}/blobs/uploads/?", "push", start_upload,  # end-4, end-11
          "a blob for {name} is coming -> send its bytes to the address in Location", PUSH),
    Route("GET HEAD /v2/{name}/blobs/uploads/{session_id}", "push", get_upload,  # end-13
          "how far is my upload to {name}? (it was cut, and shall be resumed) "
          "-> so far as Range says; go on from there"),
    Route("PATCH /v2/{name}/blobs/uploads/{session_id}", "push", append_to_upload,  # end-5
          "here are bytes of a blob for {name} ({received}) -> taken; more, or is that all?"),
    Route("PUT /v2/{name}/blobs/uploads/{session_id}", "push", finish_upload,  # end-6
          "that was all of the blob for {name}", PUSH),
    Route("DELETE /v2/{name}/blobs/uploads/{session_id}", "push", cancel_upload,  # end-14
          "forget my upload to {name} -> forgotten"),
    Route("GET /v2/{name}/blobs/{digest}", "pull", get_blob,  # end-2
          "the blob {reference} of {name}, please -> here it is ({sent})", PULL),
    Route("HEAD /v2/{name}/blobs/{digest}", "pull", get_blob,  # end-2
          "has {name} the blob {reference}? -> yes, so it need not be sent "
          "-> 404: no, so the client sends it"),
    Route("DELETE /v2/{name}/blobs/{digest}", "delete", delete_blob,  # end-10
          "take the blob {reference} from {name} -> done", DELETE),
    Route("GET HEAD /files/(?P<name>[^:@]+)[:@]{reference}(?P<file>(?s:.*))", "pull", get_file),
])


def describe_target(registry: Registry, request: Request, action: str,
                    digest: str) -> Dict[str, Any]:
    """What an event tells of the manifest or blob that it is about."""
    name = request.path_values["name"]
    kind = "manifests" if "reference" in request.path_values else "blobs"
    media_type, size = "", 0
    if action != "delete":
        # It may have been deleted since, or its upstream be away: no reason to fail a pull.
        with contextlib.suppress(Unknown, Unavailable):
            if kind == "manifests":
                manifest = registry.manifest(name, Digest(digest))
                media_type, size = manifest.media_type, len(manifest.content)
            else:
                with registry.open_blob(name, Digest(digest)) as blob:
                    media_type, size = OCTET_STREAM, blob.length
    target = {"mediaType": media_type, "digest": digest, "size": size, "length": size,
              "repository": name}
    if digest:
        target["url"] = "%s://%s/v2/%s/%s/%s" % (
            request.outer_scheme(), request.host(), name, kind, digest)
    if action == "mount" and request.get("from"):
        target["fromRepository"] = request.get("from")
    return target


def iter_events(registry: Registry, request: Request, headers: Dict[str, str],
                action: str) -> Iterator[Dict[str, Any]]:
    """Yield the events of a request that has been carried out, as Distribution writes them: one for
    each tag that it names, or a single one. `headers` are the response's."""
    reference = request.path_values.get("reference") or request.path_values.get("digest", "")
    tags, digest = [reference], ""
    if isinstance(reference, Digest):
        tags = request.query.get("tag", [""]) if action == "push" else [""]
        digest = reference
    digest = headers.get("Docker-Content-Digest", digest)
    target = describe_target(registry, request, action, digest)
    user = request.who.user if request.who else None
    for tag in tags:
        yield {
            "id": str(uuid.uuid4()), "timestamp": timestamp(), "action": action,
            "target": dict(target, tag=tag) if tag else target,
            "request": {"id": str(uuid.uuid4()), "addr": request.client,
                        "host": request.header("host"), "method": request.method,
                        "useragent": request.header("user-agent")},
            "actor": {"name": user} if user else {},
            "source": request.observation.source}


def notify(registry: Registry, request: Request, response: Response, action: str) -> bool:
    """Queue the events of a request for the endpoints that want them; returns whether there are
    any.

    Raises OSError if a change can't be queued: then the client gets an error, and makes the request
    again."""
    if action == "push" and request.get("mount"):
        action = "mount"
    headers = dict(response.headers)
    queues = [queue for queue in request.observation.queues
              if queue.endpoint.wants(action, request.path_values["name"])]
    # A later part of a blob is no further pull.
    if not queues or not headers.get("Content-Range", "bytes 0-").startswith("bytes 0-"):
        return False
    for event in iter_events(registry, request, headers, action):
        for queue in queues:
            try:
                queue.put(event)
            except OSError as error:
                if action != "pull":  # a full disk must not stop a pull
                    raise
                logger.error("can't queue a notification: %s", error)
    return True


# One request

def find_route(request: Request) -> Optional[Route]:
    """Set the route and the path_values of a request. Returns the route, None for an unknown path.

    Raises UNSUPPORTED if the path has no such method, and what PARSERS raise."""
    for pattern, routes in ROUTES:
        match = pattern.fullmatch(request.path)
        if match:
            if request.method not in routes:
                raise RegistryError("UNSUPPORTED", request.method,
                                    headers=[("Allow", ", ".join(routes))])
            request.route = routes[request.method]
            request.path_values = {key: PARSERS[key](value)
                                   for key, value in match.groupdict().items()}
            return request.route
    return None


def choose_repository(registry: Registry, request: Request, name: str) -> str:
    """The repository that a read of this name means: of those in names_to_try() that the client may
    pull, the first that exists. A tag that this one lacks is not looked for under other names.

    `ns` is what a mirror's client calls the registry that it means: a key to look up, never an
    address to call. Pushes ignore it. Raises NAME_INVALID, DENIED, UNAUTHORIZED."""
    names = names_to_try(name, request.get("ns"))
    # An image from elsewhere, in place of one that the client may not pull, would deceive.
    request.access.check(request, "pull", names[0])
    names = [other for other in names if request.allows("pull", other)]
    return next(filter(registry.has_repository, names), names[0])


def handle(registry: Registry, request: Request) -> Response:
    """Find the handler of a request and call it. Raises RegistryError, OSError, ClientLeft."""
    HOPS.passed = HOP.findall(request.header("via"))
    is_api = request.path.startswith("/v2/")
    try:
        route = find_route(request)
    finally:
        if is_api:  # whatever the path is: clients expect the 401 for what they ask first
            request.access.check(request, "pull")
    if not route:
        return Response.of_text("404: nothing here; the registry is at /v2/\n", 404)
    if registry.is_read_only and route.action in ("push", "delete"):
        raise RegistryError("DENIED", message="this registry is read-only at present")
    values = request.path_values
    name = values.get("name")
    if route.action == "pull" and name:
        values["name"] = choose_repository(registry, request, name)
    else:
        request.access.check(request, route.action, name)
    response = route.handler(registry, request, **values)
    if values.get("name") != name and request.get("ns"):
        response.headers.append(("OCI-Namespace", request.get("ns")))
    event = route.events.get(response.status)
    has_events = bool(event and request.observation
                      and notify(registry, request, response, event))
    # A response from memory would make no events.
    response.is_repeatable = is_api and not has_events and route.action in ("login", "pull")
    return response


def dispatch(registry: Registry, access: Access, request: Request) -> Response:
    """The Response to a Request, whatever happens; only ClientLeft passes through."""
    request.access = access
    try:
        return handle(registry, request)
    except RegistryError as error:  # this is what it is for: to tell the client
        return Response.of_error(error)
    except ClientLeft:
        raise
    except OSError as error:
        logger.error("%s %s: %s", request.method, request.path, error)
        status, message = HOST_FAILURES.get(error.errno or 0, (500, None))
        code = "UNAVAILABLE" if message else "UNKNOWN"
        return Response.of_error(RegistryError(code, message=message, status=status))
    except Exception:  # a bug: the log gets the traceback, the client a 500
        logger.exception("%s %s", request.method, request.path)
        return Response.of_error(RegistryError("UNKNOWN"))

# -------------------------------------------------------------------------------------------------
# 17  Page
#
# What a person sees who opens the registry in a browser, and what machines ask beside the API:
# metrics, health, the CA, scripts that set up clients. Pages are HTML and CSS with nothing from
# elsewhere; a script only copies text and shows /live. All links are relative, so pages work below
# any path of a proxy. Whatever an image says (names, commands, labels) may be an attack: fill()
# escapes all that is not Markup.
# -------------------------------------------------------------------------------------------------

# The texts of this room. Its code begins below them, at source_hash().

PAGE_STYLE = """
:root{color-scheme:light dark;font:1rem/1.5 system-ui,sans-serif;
--page:#f5f7fa;--card:#fff;--text:#1b2330;--soft:#566072;--line:#d9dfe8;--link:#0a58ad;
--own:#2f6fd0;--shared:#8a56d1;--untagged:#c05d0c;--other:#6d788a;--free:#dfe4ec}
@media(prefers-color-scheme:dark){:root{
--page:#11161d;--card:#19202a;--text:#e6eaf0;--soft:#a5afbf;--line:#323c4b;--link:#82bbff;
--own:#5b9bf5;--shared:#b48af0;--untagged:#ef9a4d;--other:#7d889b;--free:#2b3442}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);overflow-wrap:anywhere}
header,main,footer{max-width:72rem;margin:auto;padding:0 1rem}
header{padding-top:.9rem;border-bottom:1px solid var(--line)}
header,nav,form,.copy,.tools{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;align-items:baseline}
header>strong{margin-right:1rem}
nav a{padding:.3rem 0 .6rem;color:var(--soft);text-decoration:none}
nav a[aria-current]{color:var(--text);box-shadow:inset 0 -3px var(--own)}
a{color:var(--link)}a:hover{text-decoration-thickness:2px}
:focus-visible{outline:3px solid var(--own);outline-offset:2px;border-radius:2px}
.skip{position:absolute;left:-99rem;padding:.6rem 1rem;background:var(--card)}
.skip:focus{left:.5rem;top:.5rem}
h1{font-size:1.6rem;line-height:1.25;margin:1.4rem 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .6rem}caption h2{margin-top:0}
.crumbs{margin:1.2rem 0 -1.1rem}
.crumbs a+a::before{content:"/";display:inline-block;padding:0 .5rem}
.tools,.soft,footer{color:var(--soft)}
footer{padding:1.5rem 1rem;margin-top:3rem;border-top:1px solid var(--line)}
code,pre{font:.875em/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{flex:1;min-width:0;margin:0;padding:.55rem .8rem;white-space:pre-wrap;background:var(--card);
border:1px solid var(--line);border-radius:.4rem}
details pre{max-height:24rem;overflow:auto}
.copy{gap:.5rem;margin:.3rem 0;align-items:center}
td .copy,dd .copy{margin:0}
.id{max-width:20ch;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;user-select:all}
dd .id{max-width:100%}
input,button{font:inherit;padding:.4rem .8rem;color:inherit;background:var(--card);
border:1px solid var(--soft);border-radius:.4rem}
input{flex:1;min-width:8rem;max-width:28rem}
button{cursor:pointer}.copy button{padding:.1rem .6rem;font-size:.875rem;color:var(--soft);
border-color:var(--line)}
form{margin:0 0 1rem;gap:.6rem;align-items:center}
table{width:100%;margin:1.6rem 0;border-collapse:separate;border-spacing:0;background:var(--card)}
tr:last-child td{border-bottom:0}
caption{padding-bottom:.5rem;text-align:left}caption h2{margin:0}
table,dl{border:1px solid var(--line);border-radius:.4rem}
th{font-size:.875rem;font-weight:600;color:var(--soft)}
th,td{text-align:left;vertical-align:top;padding:.5rem .8rem;border-bottom:1px solid var(--line)}
th,[data-label=Size],[data-label=Pushed],[data-label=Own],[data-label=Shared]{white-space:nowrap}
[data-label=Digest] a{white-space:nowrap}
[data-label=Repository]{width:40%}[data-label=Tags]{width:34%}[data-label="Made by"]{width:34%}
[data-label="Also in"]{width:27%;font-size:.875rem}
[data-label=Size]{width:10%}[data-label=Layer]{width:9rem}[data-label=Picture]{width:25%}
[data-label=Layer] svg,[data-label=Picture] svg{margin-top:.4rem}
td:first-child>a{font-weight:600}
[data-label=Tags] a{display:inline-block;margin:0 .3rem .2rem 0;padding:0 .5rem;
border:1px solid var(--line);border-radius:.8rem;font-size:.875rem;text-decoration:none}
[data-label=Tags] a:hover{border-color:var(--link)}
.steps{counter-reset:step}.steps h2::before{counter-increment:step;content:counter(step) ". "}
dl pre{background:var(--page)}
dl{display:grid;align-items:baseline;grid-template-columns:minmax(7rem,max-content) 1fr;
gap:.35rem 1.2rem;margin:1rem 0;padding:.8rem;background:var(--card)}
dt{color:var(--soft)}dd{margin:0;min-width:0}
svg{display:block;width:100%;height:.7rem;border-radius:.2rem;background:var(--free)}
.whole svg{height:2rem;border-radius:.4rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;padding:0;list-style:none}
.legend svg{display:inline-block;width:.9rem;height:.9rem;margin-right:.5rem}
.own{fill:var(--own)}.shared{fill:var(--shared)}.untagged{fill:var(--untagged)}
.other{fill:var(--other)}.free{fill:var(--free)}
summary{cursor:pointer;padding:.4rem 0}
[hidden]{display:none!important}
#live{--good:#1a7f45;--bad:#c62828;display:grid;gap:1rem;margin-top:1rem;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr))}
@media(prefers-color-scheme:dark){#live{--good:#57c785;--bad:#ff7b7b}}
#live section{max-height:16rem;overflow:auto;padding:.6rem .8rem;background:var(--card);
border:1px solid var(--line);border-radius:.4rem}
#live h2{margin:0;font-size:1rem}#live p{margin:.4rem 0;padding-left:.6rem;font-size:.875rem;
border-left:.25rem solid var(--good)}
#live .no{border-color:var(--untagged)}#live .bad{border-color:var(--bad)}
@media(max-width:45rem){thead{position:absolute;width:1px;height:1px;
overflow:hidden;clip-path:inset(50%)}
table,tr,td,tbody,caption,dl{display:block}table{border:0;background:none}
tbody{background:var(--card);border:1px solid var(--line);border-radius:.4rem}
tr{padding:.6rem .8rem;border-bottom:1px solid var(--line)}tr:last-child{border:0}
td,td[data-label]{border:0;padding:.1rem 0;width:auto}dd{margin-bottom:.5rem}h1{font-size:1.35rem}
td[data-label=Size],td[data-label=Pushed],td[data-label=Own],td[data-label=Shared]{
display:inline-block;margin-right:1.2rem}td[data-label]:empty{display:none}
[data-label=Picture]::before{display:none}td .copy{display:inline-flex}
td[data-label]:not(:first-child)::before{content:attr(data-label) " ";color:var(--soft)}}
"""

PAGE_SCRIPT = """
for(const b of document.querySelectorAll(".copy button")){b.hidden=false;b.onclick=()=>{
getSelection().selectAllChildren(b.previousElementSibling);document.execCommand("copy");
b.textContent="Copied"}}
const live=document.getElementById("live");
if(live){const tools=live.previousElementSibling,[,only,pause,state]=tools.children,
make=(kind,text)=>Object.assign(document.createElement(kind),{textContent:text}),
hide=b=>{const words=only.value.toLowerCase().split(" ");let any=false;
for(const p of b.querySelectorAll("p")){const text=b.firstChild.textContent+p.textContent;
p.hidden=!words.every(w=>text.toLowerCase().includes(w));any=any||!p.hidden}b.hidden=!any},
parts=/^(\\S+) (\\S+(?: \\(.*?\\))? at \\S+): (.*)$/,
show=(kind,text)=>{const [,time,who,what]=parts.exec(text)||[0,"","",text];
let b=[...live.children].find(b=>b.firstChild.textContent==who);
if(!b){b=make("section","");b.tabIndex=0;b.append(make("h2",who));live.append(b)}
const p=make("p",time+" "+what);p.className=kind;b.firstChild.after(p);
while(b.children.length>99)b.lastChild.remove();
while(live.children.length>99)live.firstChild.remove();hide(b)};
let link="connecting",paused=false,kept=[];
const tell=()=>{state.textContent=link+(paused?", paused: "+kept.length+" to be shown":
live.children.length?"":", waiting")},set=text=>()=>{link=text;tell()};
tools.hidden=false;only.oninput=()=>[...live.children].forEach(hide);
pause.onclick=()=>{paused=!paused;pause.textContent=paused?"Go on":"Pause";
if(!paused)for(const one of kept.splice(0))show(...one);tell()};
const e=new EventSource("live/events");e.onopen=set("connected");
e.onerror=set("not connected; trying again");
for(const kind of ["good","no","bad"])e.addEventListener(kind,m=>{
if(!paused)show(kind,m.data);else if(kept.length<9999)kept.push([kind,m.data]);tell()})}
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%s – tinyreg</title><link rel="icon" href="data:,"><style>%s</style></head>
<body><a class="skip" href="#main">Skip to the content</a>
<header><strong>Container registry</strong><nav aria-label="Pages">%s</nav></header>
<main id="main">%s<h1>%s</h1>
%s</main>
<footer>tinyreg %s, a registry in one file: <a href="tinyreg.py">take it with you</a></footer>
<script>%s</script></body></html>
"""

GC_COMMANDS = """python3 tinyreg.py gc --untagged --dry-run
python3 tinyreg.py gc --untagged"""

SEARCH_FORM = """<form action="./" role="search"><label for="q">Name contains</label>
<input type="search" name="q" id="q" value="%s"><input type="hidden" name="order" value="%s">
<button>Search</button></form>"""

CRUMBS = '<p class="crumbs">%s%s</p>'

ABOUT_NOTE = """<p class="soft">Whoever may push can add to this. A signature counts for who has
checked it with a key: by cosign verify, or here by serve --signed-by.</p>"""

NO_MATCH = '<p>No repository has “%s” in its name. <a href="./">Show all repositories</a></p>'

NO_REPOSITORIES = """<p>Nothing is stored here yet. <a href="use">How to push an image</a>. On the
registry's own machine, where it has a network, this fetches one:</p>%s"""

NAVIGATION = """
<a href="./">Repositories</a> <a href="use">How to use it</a> <a href="disk">Disk use</a>
<a href="live">Live</a>"""


USE_PAGE = """<div class="steps">%s<h2>Let your client trust it</h2>
<p>Docker trusts a registry on its own machine as it is. On other machines, run the line for your
client. It fetches a script, and runs it as root. (docker build, crane, helm, oras, regctl and
cosign trust what the system trusts.)</p>%s
%s<h2>Pull an image</h2><p>Look for one among the <a href="./">repositories</a>: its page has the
line for every client.</p>%s<h2>Push your own</h2>%s</div>
<h2>As a mirror</h2><p>After this, docker pull alpine comes from here, if it is here:</p>%s"""

USE_CA = """<h2>Get its certificate</h2>%s<p>The second line must print <code>%s</code>, and whoever
runs the registry must tell you the same. (<a href="ca.crt">The certificate</a>)</p>"""

NOT_HERE = """<p>It was deleted, or has another name: look among the
<a href="./">repositories</a>.%s</p>"""
OR_LOG_IN = ' Or you may see it only after you <a href="login">log in</a>.'

USE_LOGIN = """<h2>Log in</h2>%s
<p>And <a href="login">here</a>, to see what only you may see.</p>"""

DISK_FACTS = """
<dl><dt>Blobs and manifests</dt><dd>%s</dd>
<dt>Uploads under way</dt><dd>%s</dd>
<dt>Measured</dt><dd>%s</dd></dl>
<h2>What garbage collection would free</h2>
<p>%s. On the registry's machine, the first line says what goes, the second one deletes it:</p>%s"""

# The first word of each is its class in CSS.
DISK_PARTS = ("own to one repository", "shared by several, and stored once",
              "untagged and not needed by what has a tag", "other files on this disk", "free")

LIVE_PAGE = """\
<p>What clients ask this registry, and what its answers tell them: a block for each client, its
newest line on top. Green went well, orange is a no that clients expect, red went wrong.</p>
<noscript>Without script it is on a terminal: %s</noscript>\
<div class="tools" hidden><label for="only">Only with the words</label>
<input type="search" id="only" placeholder="client, user or repository">
<button type="button">Pause</button><span role="status"></span></div>
<div id="live" role="log" aria-live="off" tabindex="0" aria-label="Requests"></div>"""

PLAIN_HTTP_HELP = """
Its CA is at http://{0}/ca.crt, with the SHA-256 fingerprint
{1}
(compare it with what the registry printed when it started). docker and podman look for it in
/etc/docker/certs.d/{0}/ca.crt
"""

# The scripts that set up clients. They may be pasted into a shell, so all commands stand in one
# subshell: none runs before the last line is there. They use only what every sh and a minimal
# Debian or RHEL have.
CLIENT_SCRIPT = r"""# This sets up {client} for the registry {host}:
# run it on the client, as root, once or again.
(
set -eu
[ "$(id -u)" = 0 ] || {{ echo 'run this as root, for example with sudo sh' >&2; exit 1; }}
wrote=
put() {{  # FILE MODE REMARK: the standard input becomes FILE; what was there stays beside it
    mkdir -p "${{1%/*}}"
    (umask 077; cat > "$1.tinyreg")
    chmod "$2" "$1.tinyreg"
    if [ -f "$1" ] && [ "$(cat "$1")" = "$(cat "$1.tinyreg")" ]; then
        mv "$1.tinyreg" "$1"
        echo "$1 is as it should be ($3)"
        return
    fi
    if [ -s "$1" ]; then
        case $1 in *.json|*.yaml)
            echo "add what is in $1.tinyreg to $1 by hand ($3)" >&2
            return ;;
        esac
        kept=$1.$(date +%Y%m%d-%H%M%S).bak
        cp -p "$1" "$kept"
        echo "what was in $1 is now in $kept"
    fi
    mv "$1.tinyreg" "$1"
    wrote=$1
    echo "wrote $1 ($3)"
}}
again() {{  # reload|restart SERVICE
    if systemctl "$1" "$2" 2>/dev/null; then echo "$2: $1 done"
    else echo "then: systemctl $1 $2" >&2; fi
}}
{steps})
"""

# containerd reads certs.d only if config_path says so. Its version decides in which table that is.
SET_CONFIG_PATH = r"""
c=/etc/containerd/config.toml d=/etc/containerd/certs.d
set_config_path() {
    [ -s $c ] && v=$(sed -n 's/^ *version *= *\([0-9]*\).*/\1/p' $c) ||
        case $(containerd --version) in *' v2.'*|*' 2.'*) v=3 ;; *) v=2 ;; esac
    case $v in
        3) t='[plugins."io.containerd.cri.v1.images".registry]' ;;
        2) t='[plugins."io.containerd.grpc.v1.cri".registry]' ;;
        *) return 1 ;;
    esac
    if grep -Eqs "registry\.(mirrors|configs)|(^|[ .])config_path *= *[\"'][^\"']" $c; then
        return 1
    fi
    trap 'rm -f $c.new' EXIT
    { if [ -s $c ]; then cat $c; else echo "version = $v"; fi; } |
        awk -v t="$t" -v p="  config_path = \"$d\"" '
        { w = $0; gsub(/[ \t]/, "", w); gsub(/\047/, "\"", w) }
        /^[ \t]*\[/ { inside = (w == t) }
        inside && w ~ /^config_path=/ { next }
        { print }
        w == t { print p; done = 1 }
        END { if (done == 0) { print ""; print t; print p } }' > $c.new
    containerd --config $c.new config dump 2>/dev/null | grep -q "config_path.*$d" || return 1
    put $c "$(stat -c %a $c 2>/dev/null || echo 644)" 'containerd shall read certs.d' \
        < $c.new || return 1
    again restart containerd
}
if grep -Eqs "^[^#]*config_path *= *.*$d|^ *disabled_plugins.*cri" $c; then :
elif command -v containerd > /dev/null && set_config_path; then :
else
    echo "for Kubernetes, say in $c: config_path = \"$d\"" >&2
    echo 'in containerd 2 below [plugins."io.containerd.cri.v1.images".registry],' >&2
    echo 'in 1.x below [plugins."io.containerd.grpc.v1.cri".registry]; then restart it' >&2
fi
"""

# The steps of CLIENT_SCRIPT for each client, as templates for render().
CLIENTS = {
    "docker": """\
ca|put '/etc/docker/certs.d/{host}/ca.crt' 644 'read at each pull, no restart' <<'END'
ca|{ca}
ca|END
folder|login|put '/etc/docker/certs.d/{folder}/hosts.toml' 600 'for Docker from 29 on with \
containerd'\\''s image store; with a password in it' <<'END'
folder|open|put '/etc/docker/certs.d/{folder}/hosts.toml' 644 'for Docker from 29 on with \
containerd'\\''s image store; a mirror must let everyone pull: serve --anonymous pull; or say \
clients --user NAME' <<'END'
folder|[host."{url}"]
folder|  capabilities = ["pull", "resolve"]
folder|ca|  ca = "/etc/docker/certs.d/{host}/ca.crt"
folder|login|  [host."{url}".header]
folder|login|    Authorization = "{login}"
folder|END
settings|own|put '/etc/docker/daemon.json' 644 'Docker'\\''s settings' <<'END'
settings|mirror|put '/etc/docker/daemon.json' 644 'before Docker 29, mirrors are for docker.io \
only' <<'END'
settings|{settings}
settings|END
case $wrote in */daemon.json) again reload docker ;; esac
""",
    # A hosts.toml for other registries has no `server`: pushes, and pulls of what is not here, go
    # to the registry that the image names. containerd 1.6 needs the CA in both places.
    "containerd": """\
ca|put '/etc/containerd/certs.d/{host}/ca.crt' 644 'for Kubernetes, for nerdctl, and for ctr with \
--hosts-dir /etc/containerd/certs.d; no restart' <<'END'
ca|{ca}
ca|END
folder|login|put '/etc/containerd/certs.d/{folder}/hosts.toml' 600 'with a password in it' <<'END'
folder|open|put '/etc/containerd/certs.d/{folder}/hosts.toml' 644 'a mirror must let everyone \
pull: serve --anonymous pull; or say clients --user NAME' <<'END'
folder|[host."{url}"]
folder|  capabilities = ["pull", "resolve"]
folder|ca|  ca = "/etc/containerd/certs.d/{host}/ca.crt"
folder|login|  [host."{url}".header]
folder|login|    Authorization = "{login}"
folder|END
put '/etc/containerd/certs.d/{host}/hosts.toml' 644 'for Kubernetes, for nerdctl, and for ctr with \
--hosts-dir /etc/containerd/certs.d; no restart' <<'END'
server = "{url}"
ca|ca = "/etc/containerd/certs.d/{host}/ca.crt"
[host."{url}"]
  capabilities = ["pull", "resolve", "push"]
ca|  ca = "/etc/containerd/certs.d/{host}/ca.crt"
END
{set_config_path}""",
    # Podman has no word for "all origins", so each has a table.
    "podman": """\
ca|put '/etc/containers/certs.d/{host}/ca.crt' 644 'for podman, buildah, skopeo, CRI-O' <<'END'
ca|{ca}
ca|END
tables|put '/etc/containers/registries.conf.d/50-tinyreg.conf' 644 'read at each pull' <<'END'
insecure|[[registry]]
insecure|location = "{host}"
insecure|insecure = true
origin|[[registry]]
origin|prefix = "{origin[0]}"
origin|location = "{host}/{origin[1]}"
origin|insecure|insecure = true
tables|END
""",
    "k3s": """\
ca|put '/etc/rancher/k3s/certs.d/{host}/ca.crt' 644 'on every node' <<'END'
ca|{ca}
ca|END
put '/etc/rancher/k3s/registries.yaml' 644 'then: systemctl restart k3s, or k3s-agent' <<'END'
mirrors:
served|  "{served}":
served|    endpoint: ["{url}"]
ca|configs:
ca|  "{host}":
ca|    tls:
ca|      ca_file: /etc/rancher/k3s/certs.d/{host}/ca.crt
END
""",
    # buildx, crane, helm, oras, regctl and cosign trust what the system trusts.
    "system": """\
ca|if command -v update-ca-trust > /dev/null; then
ca|    d=/etc/pki/ca-trust/source/anchors u=update-ca-trust
ca|    if [ -d /etc/ca-certificates/trust-source ]; then
ca|        d=/etc/ca-certificates/trust-source/anchors
ca|    fi
ca|elif [ -d /etc/pki/trust/anchors ]; then d=/etc/pki/trust/anchors u=update-ca-certificates
ca|else d=/usr/local/share/ca-certificates u=update-ca-certificates; fi
ca|put "$d/tinyreg-{file}.crt" 644 'for all programs that trust what the system trusts' <<'END'
ca|{ca}
ca|END
ca|$u
""",
}

def source_hash(text: str) -> str:
    """What a Content-Security-Policy calls this inline style or script."""
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


PAGE_HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy",
     "default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; "
     "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
     % (source_hash(PAGE_STYLE), source_hash(PAGE_SCRIPT))),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
]

# HTML


class Markup(str):
    """HTML. Every other string that gets into a page is text, and is escaped."""


# What a page may contain: Markup, text, a number, None, or a list of these.
Content = Any


def markup(content: Content) -> Markup:
    """The content as HTML; None is nothing."""
    if isinstance(content, Markup):
        return content
    if isinstance(content, (list, tuple)):
        return Markup("".join(markup(part) for part in content))
    return Markup("" if content is None else html.escape(harmless(str(content))))


def fill(template: str, *contents: Content) -> Markup:
    """One of our own templates, with contents for each %s, escaped unless they are Markup."""
    return Markup(template % tuple(markup(content) for content in contents))


def link(text: Content, name: Optional[str] = None, reference: Optional[str] = None,
         **search: Any) -> Markup:
    """A link to the page of a repository, of an image, or of a search."""
    query = dict(repository=name, reference=reference, **search)
    query = {key: value for key, value in query.items() if value}
    return fill('<a href="./?%s">%s</a>', urllib.parse.urlencode(query), text)


def table(caption: str, columns: str, rows: Sequence[Sequence[Content]]) -> Optional[Markup]:
    """A table, without those of the columns in which nothing stands; None if it has no rows. On a
    phone it becomes a list: CSS writes each cell's heading, which is in its data-label, before
    it."""
    if not rows:
        return None
    headings = columns.split(", ")
    used = [number for number, cells in enumerate(zip(*rows)) if any(cells)]
    head = [fill('<th scope="col">%s</th>', headings[number]) for number in used]
    body = []
    for row in rows:
        cells = [fill('<td role="cell" data-label="%s">%s</td>', headings[number], row[number])
                 for number in used]
        body.append(fill('<tr role="row">%s</tr>\n', cells))
    return fill('<table role="table"><caption><h2>%s</h2></caption><thead><tr>%s</tr></thead>'
                "<tbody>%s</tbody></table>", caption, head, body)


def definitions(heading: Optional[str], values: Dict[str, Content]) -> Optional[Markup]:
    """A list of terms with their values, below a heading if there is one; None if no term has a
    value. Each part of a JSON list or object has a line of its own."""
    items = []
    for term, value in values.items():
        if isinstance(value, dict):
            value = [fill("%s=%s", key, part) if part else key
                     for key, part in sorted(value.items())]
        if isinstance(value, list):
            value = [fill("<code>%s</code><br>", part) for part in value]
        if markup(value):
            items.append(fill("<dt>%s</dt><dd>%s</dd>\n", term, value))
    if not items:
        return None
    return fill("%s<dl>%s</dl>", fill("<h2>%s</h2>", heading) if heading else None, items)


def copyable(shown: Content) -> Markup:
    """A text with a button to copy it, which only the script shows."""
    return fill('<div class="copy">%s<button type="button" hidden>Copy</button></div>\n', shown)


def command_line(text: str) -> Markup:
    """Commands, or the lines of a file, to copy."""
    # harmless() would escape the ends of lines, too.
    lines = Markup("\n".join(markup(line) for line in text.splitlines()))
    return copyable(fill("<pre>%s</pre>", lines))


def digest_text(digest: str) -> Markup:
    """A digest to copy. CSS cuts what is seen of it where there is little room."""
    return copyable(fill('<code class="id">%s</code>', digest))


def bar(parts: Iterable[Tuple[str, int]], whole: int, words: str) -> Markup:
    """A bar as SVG. `parts` are (CSS class, amount) from the left, `whole` is the amount that fills
    the bar, and `words` say the same to those who can't see it. A small part can be seen, too."""
    shapes = []
    left = 0.0
    for kind, amount in parts:
        width = max(100.0 * amount / (whole or 1), 0.5 if amount else 0.0)
        shapes.append(fill('<rect class="%s" x="%s" width="%s" height="10"/>', kind, left, width))
        left += width
    return fill('<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="%s">'
                "%s</svg>", words, shapes)


def page(title: str, *content: Content, above: Content = None, status: int = 200) -> Response:
    """A whole page. `above` stands above its title, and leads to where it belongs."""
    here = ">%s<" % title
    if here not in NAVIGATION:
        here = ">Repositories<"
    navigation = NAVIGATION.replace(here, ' aria-current="page"' + here)
    heading = Markup(markup(title).replace("/", "/<wbr>"))
    text = fill(PAGE, title, Markup(PAGE_STYLE), Markup(navigation), above, heading, content,
                __version__, Markup(PAGE_SCRIPT))
    return Response(status, PAGE_HEADERS, text.encode("utf-8", "replace"))


UNITS_OF_TIME = (("years", 31557600), ("months", 2629800), ("days", 86400), ("hours", 3600),
                 ("minutes", 60))  # in seconds


def ago(moment: float) -> str:
    """How long ago a Unix time is, for people, in the largest unit of which two fit."""
    passed = time.time() - moment
    if passed < -CLOCK_SLACK:
        return "in the future: a clock is, or was, wrong"
    for unit, size in UNITS_OF_TIME:
        if passed >= 2 * size:
            return "%d %s ago" % (passed // size, unit)
    return "a moment ago"


def when(moment: float) -> Optional[Markup]:
    """How long ago a Unix time is, and the time itself for who points at it; None for 0.0."""
    if not moment:
        return None
    return fill('<time title="%s">%s</time>', timestamp(moment), ago(moment))


def age(created: Any) -> Optional[Markup]:
    """How long ago an RFC 3339 time is. None for what is no time, and for the first ten years of
    Unix time and before: builds that shall be reproducible set such dates."""
    try:
        moment = calendar.timegm(time.strptime(str(created)[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
    return when(moment) if moment > 86400 * 3660 else None


# Pages of repositories and images

IMAGE_ROW = "Name, Platform or type, Size, Pushed, About it, Digest"

# What people call that which is about an image, by words in its manifest.
KINDS = """\
signature simplesigning cosign.artifact.sig cosign/sign notary.signature
SBOM spdx cyclonedx syft sbom
attestation in-toto dsse attest
"""

PULL_COMMANDS = {  # of an image or of files, by the scheme that the registry speaks
    "https": """\
docker pull %s
podman pull %s
ctr images pull %s
skopeo copy docker://%s oci-archive:image.tar
""",
    "http": """\
docker pull %s
podman pull --tls-verify=false %s
ctr images pull --plain-http %s
skopeo copy --src-tls-verify=false docker://%s oci-archive:image.tar
""", "https files": "oras pull %s", "http files": "oras pull --plain-http %s"}


def member(document: Dict[str, Any], key: str, kind: Type[Any]) -> Any:
    """The list or dict under a key of unchecked JSON; an empty one if there is none."""
    value = document.get(key)
    return value if isinstance(value, kind) else kind()


def host_in(name: str) -> str:
    """The first component of a repository's name, if it is the host that the images come from;
    else "": they were pushed here."""
    host, slash, _ = name.partition("/")
    return host if slash and re.search(r"\.|_[0-9]+$", host) else ""


def by_name(name: str) -> Any:
    """The key that sorts repositories, or tags, as people do: those from one host together, and
    student2 before student10."""
    parts = [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    return host_in(name), parts


def tag_times(registry: Registry, name: str) -> Optional[Dict[str, float]]:
    """The tags of a repository, and when each was pushed, without those that are about an image;
    None if the repository is not there."""
    with contextlib.suppress(Unknown):  # it was deleted since
        return {tag: registry.pushed(name, tag) for tag in registry.tags(name)
                if not FALLBACK_TAG.fullmatch(tag)}
    return None


def last_push(registry: Registry, name: str) -> float:
    """When any tag of a repository was pushed last; 0.0 without one."""
    return max((tag_times(registry, name) or {}).values(), default=0.0)


def one_page(request: Request, entries: Iterable[str], noun: str,
             pushed: Callable[[str], float]) -> Tuple[List[str], Markup]:
    """ROWS of these repositories or tags, in the order that the request asks for: that of their
    names, or the last pushed first. And links to the other order and to the pages around."""
    entries = sorted(entries, key=by_name)
    name, wanted, order = map(request.get, ("repository", "q", "order"))
    if order:
        entries.sort(key=pushed, reverse=True)
    first = parse_count(request.get("start", "0"))
    links = [link("by name" if order else "newest first", name, q=wanted,
                  order="" if order else "newest")]
    for text, start in ("previous page", first - ROWS), ("next page", first + ROWS):
        if start in range(len(entries)):
            links.append(link(text, name, q=wanted, order=order, start=start))
    return entries[first:first + ROWS], fill(
        '<p class="tools">%s%s</p>\n', counted(len(entries), noun), [[" ", one] for one in links])


# The page of an image

def attached(registry: Registry, name: str, digest: Digest) -> Iterator[Tuple[str, Manifest]]:
    """Yield (kind, manifest) of what is about a manifest: what cosign has tagged with its digest,
    and its referrers, at most ROWS of them, and no more after MAX_PAGE_READ bytes: a page may have
    a hundred images, each with referrers of 4 MiB."""
    tagged: List[Manifest] = []
    size = 0
    for suffix in COSIGN_SUFFIXES:
        with contextlib.suppress(Unknown):  # most have no such tag
            target = registry.resolve(name, fallback_tag(digest) + suffix)
            tagged += filter(None, [find_readable(registry, name, target)])
    for manifest in itertools.chain(
            tagged, itertools.islice(registry.referrers(name, digest), ROWS)):
        size += len(manifest.content)
        if size > MAX_PAGE_READ:
            break
        kinds = [kind for kind, *words in map(str.split, KINDS.splitlines())
                 if any(word.encode() in manifest.content for word in words)]
        yield (kinds or [manifest.artifact_type or manifest.media_type])[0], manifest


def image_row(registry: Registry, name: str, reference: Reference,
              text: Content = None) -> Sequence[Content]:
    """The row of a tag or manifest in a table with the headings IMAGE_ROW. `text`, which names a
    platform, stands for the reference."""
    try:
        digest = resolve_reference(registry, name, reference)
        image = describe(registry, name, digest)
        kinds = {kind for kind, _ in attached(registry, name, digest)}
    except (Unknown, Invalid) as error:  # one that is missing or damaged must not hide the others
        return text or shorten(reference), "not here: %s" % error.message, None, None, None, None
    return (link(text or shorten(reference), name, reference),
            None if text else ", ".join(image["platforms"]), in_units(image["size"]),
            when(registry.pushed(name, reference)), ", ".join(sorted(kinds)), digest_text(digest))


def platform_table(registry: Registry, name: str, index: Manifest) -> Optional[Markup]:
    """A table of the manifests of an index. BuildKit says that its attestations are for no
    platform."""
    return table("Platforms", IMAGE_ROW, [
        image_row(registry, name, child.digest, child.platform.replace(NO_PLATFORM, "attestation"))
        for child in index.manifests[:ROWS]])


def layer_table(registry: Registry, request: Request, name: str,
                layers: Sequence[Descriptor], history: Sequence[Any]) -> Optional[Markup]:
    """The layers with the commands that made them, and with the other repositories that have them,
    as far as the client may pull those. Unless there is one command for each layer, nobody can
    tell which made which."""
    history = [step for step in history if isinstance(step, dict)]
    if sum(not step.get("empty_layer") for step in history) != len(layers):
        history = [{}] * len(layers)
    sharers = (registry.usage(PAGE_PATIENCE) or {}).get("shared", {})
    rest = iter(layers)
    rows: List[Sequence[Content]] = []
    largest = max((layer.size for layer in layers), default=1)
    for step in history:
        # What docker build writes around a command says nothing.
        command = re.sub(r"^(RUN )?/bin/sh -c (#\(nop\) +)?| # buildkit$", r"\1",
                         member(step, "created_by", str))
        if step.get("empty_layer"):
            rows.append((None, None, fill("<code>%s</code>", command), None, None))
            continue
        layer = next(rest)
        size = in_units(layer.size)
        others = [[link(other, other), " "] for other in sharers.get(layer.digest, ())
                  if other != name and request.allows("pull", other)]
        others[4:] = others[4:] and [["…"]]
        rows.append((bar([("own", layer.size)], largest, size), size,
                     fill("<code>%s</code>", command or layer.media_type), others,
                     fill('<a href="v2/%s/blobs/%s">%s</a>', name, layer.digest,
                          shorten(layer.digest))))
    return table("Layers, the lowest first", "Layer, Size, Made by, Also in, Digest", rows)


def image_details(registry: Registry, request: Request, name: str,
                  manifest: Manifest, files: Dict[str, Descriptor]) -> Content:
    """The layers and the config of an image; what a chart says of itself; None of an index. The
    config may contain any JSON: it was not checked when it was pushed."""
    if not manifest.blobs:
        return None
    config = read_config(registry, name, manifest)
    if files:
        return definitions("Config", dict(sorted(config.items())))
    settings = member(config, "config", dict)
    words = member(settings, "Entrypoint", list) + member(settings, "Cmd", list)
    command = " ".join(shlex.quote(str(word)) for word in words)
    facts = {"Runs": [command] if words else None}
    facts.update((re.sub("(?<=[a-z])(?=[A-Z])", " ", key), value)
                 for key, value in sorted(settings.items())
                 if value and key not in ("Entrypoint", "Cmd"))
    facts["Author"] = config.get("author")
    layers = manifest.blobs[1:] if manifest.document.get("config") else manifest.blobs
    return [layer_table(registry, request, name, layers, member(config, "history", list)),
            definitions("Config", facts)]


def pull_commands(request: Request, image: str, kind: str) -> Optional[Markup]:
    """What to type to get an image, or files, for each client."""
    image = "%s/%s" % (request.host(), image)
    return definitions("Pull it", {
        line.split()[0].replace("ctr", "containerd"): command_line(line % image)
        for line in PULL_COMMANDS[request.outer_scheme() + kind].splitlines()})


def image_facts(registry: Registry, name: str, reference: Reference,
                manifest: Manifest) -> Optional[Markup]:
    """What the top of an image's page says."""
    image = describe(registry, name, manifest.digest)
    size = "%s in %s, the manifests included" % (in_units(image["size"]),
                                                 counted(image["count"], "blob"))
    missing = "%d of the platforms" % image["missing"] if image["missing"] else None
    subject = find_subject(manifest, reference)
    return definitions(None, {
        "Pushed": when(registry.pushed(name, reference)), "Built": age(image["created"]),
        "Size": size, "Platform or type": ", ".join(image["platforms"]), "Not here": missing,
        "Digest": digest_text(manifest.digest), "Type": manifest.media_type,
        "About": link(shorten(subject), name, subject) if subject else None})


def history_table(registry: Registry, name: str, reference: Reference) -> Optional[Markup]:
    """What a tag has pointed to; None if it was never moved."""
    history = [] if isinstance(reference, Digest) else registry.history(name, reference)
    rows = [(when(moment), link(digest, name, digest)
             if find_readable(registry, name, digest) else digest + ", deleted since")
            for digest, moment in history[:ROWS]]
    return table("What this tag has pointed to", "Pushed, Manifest",
                 rows if len(rows) > 1 else [])


def image_page(registry: Registry, request: Request, name: str, reference: Reference) -> Response:
    """All that is known of one manifest. Raises NAME_UNKNOWN, MANIFEST_UNKNOWN."""
    manifest = registry.manifest(name, resolve_reference(registry, name, reference))
    image = image_text(name, reference)
    files: Dict[str, Descriptor] = {}
    with contextlib.suppress(Invalid):  # names that no file can have; the layers are shown
        files = files_in(registry, name, manifest)
    about = [(link(kind, name, referrer.digest),
              referrer.artifact_type or referrer.media_type, digest_text(referrer.digest))
             for kind, referrer in attached(registry, name, manifest.digest)]
    return page(
        image.replace(reference, shorten(reference)),
        image_facts(registry, name, reference, manifest),
        pull_commands(request, image, " files" if files else ""),
        table("Files", "Name, Size, Type", [
            (fill('<a href="files/%s/%s">%s</a>', image, urllib.parse.quote(file), file),
             in_units(blob.size), blob.media_type) for file, blob in files.items()]),
        platform_table(registry, name, manifest),
        image_details(registry, request, name, manifest, files),
        table("About this image", "Kind, Type, Digest", about), about and fill(ABOUT_NOTE),
        history_table(registry, name, reference),
        definitions("Annotations", dict(sorted(
            member(manifest.document, "annotations", dict).items()))),
        fill('<h2>Take it with you</h2><p><a href="archive/%s.tar">Download it as an archive</a>, '
             'for docker load; or <a href="v2/%s/manifests/%s">the manifest as it is</a>.</p>',
             image, name, manifest.digest),
        above=fill(CRUMBS, link("Repositories", q=request.get("q")),
                   link(name, name, q=request.get("q"))))


# Lists

def tags_page(registry: Registry, request: Request, name: str) -> Response:
    """One page of a repository's tags, and the manifests without a tag, unless there is too much to
    look for them. What is about a manifest is on the page of that. Raises NAME_UNKNOWN."""
    tags, tools = one_page(
        request, [tag for tag in registry.tags(name) if not FALLBACK_TAG.fullmatch(tag)
                  or not find_readable(registry, name, Digest("sha256:" + tag[7:71]))],
        "tag", functools.partial(registry.pushed, name))
    digests = untagged(registry, name, MAX_PAGE_READ)
    return page(
        name, tools,
        table("Tags", IMAGE_ROW, [image_row(registry, name, tag) for tag in tags]),
        table("Without a tag", IMAGE_ROW, [image_row(registry, name, digest)
                                           for digest in (digests or [])[:ROWS]]),
        fill("<p>What has no tag is not looked for here, among so much; tinyreg.py ls %s lists it."
             "</p>", name) if digests is None else None,
        above=fill(CRUMBS, link("Repositories", q=request.get("q")), None))


def repositories_page(registry: Registry, request: Request) -> Response:
    """One page of the repositories, each with its last tags. A search looks at all names."""
    wanted, order = request.get("q", "").strip().lower(), request.get("order")
    names, tools = one_page(
        request, [name for name in registry.repositories() if wanted in name
                  and request.access.lists(request, name)], "repository",
        functools.partial(last_push, registry))
    sizes = (registry.usage(PAGE_PATIENCE) or {}).get("repositories", {})
    tables: Dict[str, List[Sequence[Content]]] = {}
    for name in names:
        times = tag_times(registry, name)
        if times is None:
            continue
        tags = sorted(times, key=lambda tag: (times[tag], by_name(tag)), reverse=True)
        links = [link(tag, name, tag, q=wanted) for tag in tags[:4]]
        more = " and %d more" % (len(tags) - 4) if len(tags) > 4 else None
        group = "Newest first" if order else host_in(name)
        shown = name if order else name[len(group):].lstrip("/")
        tables.setdefault(group, []).append((
            link(shown, name, q=wanted), [links, more],
            in_units(sum(sizes[name])) if name in sizes else None,
            when(times[tags[0]] if tags else 0.0)))
    nothing = fill(NO_MATCH, wanted) if wanted else fill(
        NO_REPOSITORIES, command_line("python3 tinyreg.py pull alpine"))
    return page(
        "Repositories", fill(SEARCH_FORM, wanted, order), tools if names else nothing,
        [table(group or "Pushed here", "Repository, Tags, Size, Pushed", rows)
         for group, rows in tables.items()])


def for_people(request: Request, response: Response) -> Response:
    """The response; an error as a page, if a browser asked for one."""
    if (not response.error or request.path.startswith("/v2")
            or "text/html" not in request.header("accept")):
        return response
    shown = page("No", fill("<p>%s</p>", response.error[:1].upper() + response.error[1:] + "."))
    response.body = shown.body
    response.headers = shown.headers + [header for header in response.headers
                                        if header[0] != "Content-Type"]
    return response


def get_page(registry: Registry, request: Request) -> Response:
    """The repositories, the tags of a repository, or one image, as the query says; or that it is
    not here."""
    registry = registry.at_hand()  # to look is not to fetch
    name, reference = request.get("repository"), request.get("reference")
    try:
        if name is None:
            return repositories_page(registry, request)
        if not request.allows("pull", parse_name(name)):  # nor may the client learn that it exists
            raise RegistryError("NAME_UNKNOWN", name)
        if reference is None:
            return tags_page(registry, request, name)
        return image_page(registry, request, name, parse_reference(reference))
    except Unknown:
        advice = request.access.users_file and Markup(OR_LOG_IN)
        return page("Not here", fill(NOT_HERE, advice), status=404)


# Disk use

def largest_repositories(sizes: Sequence[Tuple[int, int, str]]) -> Optional[Markup]:
    """A table of repositories, the largest first. `sizes` are (bytes that only it has, bytes that
    others have, too, name)."""
    sizes = sorted(sizes, key=lambda size: (-size[0], -size[1], size[2]))[:LARGEST]
    most = max((own + shared for own, shared, _ in sizes), default=1)
    rows = []
    for own, shared, name in sizes:
        words = "%s of its own, %s shared" % (in_units(own), in_units(shared))
        rows.append((link(name, name), in_units(own), in_units(shared),
                     bar([("own", own), ("shared", shared)], most, words)))
    return table("The largest repositories", "Repository, Own, Shared, Picture", rows)


@functools.lru_cache(maxsize=1)
def garbage(store: Directory, measured: float) -> int:
    """The bytes that nothing leads to from a tag. It takes long, so it is known once for each
    measurement. Raises OSError."""
    collection = Collection(store, untagged=True, dry_run=True)
    collection.run()
    return collection.counts["bytes"]


def disk_page(registry: Registry, request: Request) -> Response:
    """What takes the space, what is shared, and what is free; measured every now and then."""
    usage = registry.usage()
    if usage is None:
        return page("Disk use", fill("<p>This registry is served from an archive; it takes no "
                                     "space of its own.</p>"))
    used, free, unlinked = usage["bytes"], usage["free"], usage["unlinked"]
    freed = unlinked
    if usage["took"] < PAGE_PATIENCE:
        with contextlib.suppress(OSError):  # a disk that is read-only
            freed = garbage(registry.at_hand(), usage["time"])
    # Most of what gc would free has a link yet, from the repository that alone has it.
    own = sum(own for own, _ in usage["repositories"].values())
    own = max(own + unlinked - freed, 0)
    sizes = own, used - own - freed, freed, usage["total"] - free - used, free
    parts = list(zip(DISK_PARTS, sizes))
    legend = [fill("<li>%s%s %s</li>\n", bar([(words, 1)], 1, words), in_units(size), words)
              for words, size in parts]
    return page(
        "Disk use",
        fill('<div class="whole">%s</div><ul class="legend">%s</ul>',
             bar(parts, usage["total"], "the sizes below, as parts of the disk"), legend),
        fill(DISK_FACTS, "%d, %s" % (usage["blobs"], in_units(used)), usage["uploads"],
             ago(usage["time"]), in_units(freed), command_line(GC_COMMANDS)),
        largest_repositories([(own, shared, name)
                              for name, (own, shared) in usage["repositories"].items()
                              if request.allows("pull", name)]))


# Setting up clients

class ClientSetup(NamedTuple):
    """What a client is told about this registry."""

    host: str
    ca: Optional[str]            # the CA's certificate; "" if the system knows it; None without TLS
    origins: Sequence[str] = ()  # of a mirror: the registries of which the store has images, …
    only_known: bool = False     # … and no others, where a client could ask for all
    login: str = ""              # the Authorization header for that

    @property
    def url(self) -> str:
        return ("http://" if self.ca is None else "https://") + self.host


def render(template: str, values: Dict[str, Any]) -> Iterator[str]:
    """Yield the template with its {values}, in pieces. A line that begins with NAME| is left out if
    the value NAME is empty or false; if that is a list, the lines come once for each item, which
    {NAME} is then. A line may have several, the outer first."""
    for names, lines in itertools.groupby(template.splitlines(True),
                                          lambda line: re.findall(r"^(\w+)\|", line)):
        if names:
            value = values[names[0]]
            section = "".join(line.partition("|")[2] for line in lines)
            for item in value if isinstance(value, list) else filter(None, [value]):
                yield from render(section, dict(values, **{names[0]: item}))
        else:
            yield "".join(lines).format(**values)


def client_script(client: str, setup: ClientSetup) -> str:
    """A script for sh that sets up a client; "" if nothing is needed. Files of others stay."""
    insecure, origins = setup.ca is None, list(setup.origins)
    settings = {}
    # Docker can't give a password to a mirror, and one that wants a password stops all pulls.
    if origins and not setup.login:
        settings["registry-mirrors"] = [setup.url]
    if insecure:
        settings["insecure-registries"] = [setup.host]
    steps = "".join(render(CLIENTS[client], dict(
        setup._asdict(), url=setup.url, ca=(setup.ca or "").strip(), insecure=insecure,
        file=setup.host.replace(":", "-").strip("[]"), set_config_path=SET_CONFIG_PATH,
        open=not setup.login, own=not origins, mirror=bool(origins),
        settings=settings and json.dumps(settings), tables=insecure or bool(origins),
        origin=[(host, origin_of(host)) for host in origins],
        folder=origins if setup.only_known else ["_default"] if origins else [],
        served=[setup.host] + origins if setup.only_known or not origins else ["*"])))
    return CLIENT_SCRIPT.format(client=client, host=setup.host, steps=steps) if steps else ""


def known_origins(registry: Registry, is_listed: Callable[[str], bool] = bool) -> List[str]:
    """docker.io, and the registries from which the images of those repositories come that
    `is_listed` accepts."""
    hosts = {host for host, names in itertools.groupby(registry.repositories(), host_in)
             if host and any(map(is_listed, names))}
    return sorted({re.sub(r"_([0-9]+)$", r":\1", host) for host in hosts} | {"docker.io"})


def outside_host(request: Request) -> str:
    """HOST[:PORT] by which other machines know this registry: never localhost, unless the registry
    serves this machine only."""
    host = request.host()
    if is_this_machine(host) and not request.access.only_local:
        return os.uname().nodename + host[len(without_port(host)):]
    return host


def client_setup(registry: Registry, request: Request, mirror: bool) -> ClientSetup:
    """What a client is told over HTTP; only of origins that it may see."""
    ca = (request.ca or b"").decode() if request.outer_scheme() == "https" else None
    origins = ["docker.io"] if mirror else []
    if mirror and request.allows("pull"):
        origins = known_origins(registry, functools.partial(request.access.lists, request))
    return ClientSetup(outside_host(request), ca, origins)


def use_script(registry: Registry, request: Request, client: str) -> Response:
    """The script alone that sets up a client; with ?mirror in the target, for all origins."""
    if client not in CLIENTS:
        clients = ", ".join(CLIENTS)
        return Response.of_text("404: there is a script for each of: %s\n" % clients, 404)
    setup = client_setup(registry, request, request.get("mirror") is not None)
    return Response.of_text(client_script(client, setup) or "# nothing is needed\n")


def client_help(setup: ClientSetup) -> Optional[Markup]:
    """What to run on a machine to set up each of the clients."""
    query = "?mirror" if setup.origins else ""
    ca = "--cacert tinyreg-ca.crt " if setup.ca else ""
    return definitions(None, {
        client: (command_line("curl -fsS %s%s | sudo sh" % (
            ca, shlex.quote("%s/use/%s.sh%s" % (setup.url, client, query)))),
                 fill('<a href="use/%s.sh%s">what it does</a>', client, query))
        for client in CLIENTS if client_script(client, setup)})


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a PEM certificate, as openssl x509 -fingerprint and browsers show it."""
    encoded = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).hexdigest().upper()
    return ":".join(re.findall("..", encoded))


def use_page(registry: Registry, request: Request) -> Response:
    """How to use this registry, for a person who was told its address and nothing else."""
    host = outside_host(request)
    ca = request.ca and fill(USE_CA, command_line(
        "curl -fsS -o tinyreg-ca.crt http://%s/ca.crt\n"
        "openssl x509 -noout -fingerprint -sha256 -in tinyreg-ca.crt" % host),
        fingerprint(request.ca))
    user = request.access.identify(request).user or "your-name"
    place = request.access.rules.place_to_push(user) or "me/**"
    image = "%s/%s" % (host, place.replace("**", "alpine").replace("*", "alpine"))
    login = request.access.users_file and fill(USE_LOGIN, command_line("docker login " + host))
    setup, mirror = [client_help(client_setup(registry, request, mirror))
                     for mirror in (False, True)]
    return page("How to use it", fill(
        USE_PAGE, ca, setup, login, command_line("docker pull %s/NAME:TAG" % host),
        command_line("docker tag alpine {0}\ndocker push {0}".format(image)),
        mirror))


def log_in(registry: Registry, request: Request) -> Response:
    """Back to the page. Access has made the browser ask for a password first, if there are any.
    Raises UNAUTHORIZED."""
    return Response(303, [("Location", "./")])


# Downloads

def download_headers(content_type: str, file: str) -> List[Tuple[str, str]]:
    return [("Content-Type", content_type), ("Content-Disposition", "attachment; filename=" + file)]


def plan_archive(registry: Registry, source: Registry, name: str,
                 reference: Reference) -> ArchiveWriter:
    """What get_archive() sends of a source: of the registry, or of what is at hand. Referrers that
    the registry refuses stay behind. Raises NAME_UNKNOWN, MANIFEST_UNKNOWN,
    BLOB_UNKNOWN; UNAVAILABLE if an upstream is away."""
    writer = ArchiveWriter()
    report = copy(source, writer, name, reference,
                  check=lambda name, tag, digest: find_readable(registry, name, digest))
    if report.missing:
        raise RegistryError("BLOB_UNKNOWN", *report.missing)
    writer.plan()
    return writer


def get_archive(registry: Registry, request: Request, name: str, reference: Reference) -> Response:
    """An image with its signatures and SBOMs, as a tar that docker load, podman load, ctr import
    and tinyreg.py load read. Its blobs are read while they are sent. Raises NAME_UNKNOWN,
    MANIFEST_UNKNOWN, BLOB_UNKNOWN."""
    try:
        writer = plan_archive(registry, registry, name, reference)
    except Unavailable as error:
        # While an upstream is away, what is here is served: of an index, what was pulled of it. But
        # not without the rules that are around the store, as that of --signed-by.
        registry.manifest(name, resolve_reference(registry, name, reference))
        try:
            writer = plan_archive(registry, registry.at_hand(), name, reference)
        except Unknown:
            raise error
    (_, blobs), = writer.files
    file = re.sub("[^A-Za-z0-9._-]+", "_", "%s_%s" % (name, reference)) + ".tar"
    return Response(200, download_headers("application/x-tar", file),
                    Stream(functools.partial(writer.write, blobs), writer.size(blobs)))


def get_own_source(registry: Registry, request: Request) -> Response:
    """This file, unless it was moved or deleted since the start."""
    source = read_file(__file__, -1)
    if source is None:
        return Response.of_text("404: tinyreg.py is not where it was started from\n", 404)
    return Response(200, download_headers("text/x-python; charset=utf-8", "tinyreg.py"), source)


# Live

def check_live(request: Request) -> None:
    """Raises DENIED or UNAUTHORIZED if the client may not watch what others do. With --log explain,
    which is meant for a classroom, everybody may; else who may delete in all repositories."""
    if not request.observation.live:
        raise RegistryError("UNSUPPORTED",
                            message="an archive is served here; there is nothing to see live")
    if request.observation.style != "explain":
        # It is no repository's name: only a rule for ** fits it.
        request.access.check(request, "delete", "**")


def live_page(registry: Registry, request: Request) -> Response:
    """The page that shows what clients and registry say to each other, as it happens. Raises
    DENIED, UNAUTHORIZED, UNSUPPORTED."""
    check_live(request)
    command = "curl -N %s://%s/live/events" % (request.outer_scheme(), request.host())
    return page("Live", fill(LIVE_PAGE, command_line(command)))


def send_live_events(request: Request, exchanges: Iterator[Optional[Exchange]],
                     send: Callable[[bytes], Any]) -> None:
    """Send what the client may see of each exchange, as server-sent events, until it leaves.

    While nothing happens, `send` gets an empty block several times a second, by which the server
    notices that it stops, and a line every few seconds, by which it notices that the client has
    left."""
    send(b": connected, waiting\n\n")
    for number, exchange in enumerate(exchanges):
        if exchange is None:
            send(b"\n" if number % 50 == 49 else b"")
            continue
        if not request.access.pulls_everything(request):
            exchange = without_names(exchange)
        allowed = not exchange.name or request.allows("pull", exchange.name)
        if allowed and exchange.route != "live_events":
            line = "event: %s\ndata: %s\n\n" % (
                outcome(exchange), harmless(request.observation.explain(exchange)))
            send(line.encode("utf-8", "replace"))


def live_events(registry: Registry, request: Request) -> Response:
    """The events for the script of the live page. Raises DENIED, UNAUTHORIZED, UNSUPPORTED."""
    check_live(request)
    # X-Accel-Buffering makes nginx pass each event on at once.
    headers = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"),
               ("X-Accel-Buffering", "no")]
    exchanges = request.observation.live.watch()
    next(exchanges)  # from here on; only then is the client told that it is connected
    return Response(200, headers, Stream(
        functools.partial(send_live_events, request, exchanges)))


# For machines

USAGE_GAUGES = """\
store_bytes %(bytes)d
store_blobs %(blobs)d
store_unlinked_bytes %(unlinked)d
store_repositories %(repositories)d
store_uploads %(uploads)d
store_measured_seconds %(time).15g
store_free_bytes %(free)d
"""


def get_metrics(registry: Registry, request: Request) -> Response:
    """Numbers for Prometheus. Raises DENIED, UNAUTHORIZED."""
    if not request.observation.metrics_open:
        request.access.check(request, "watch")
    gauges = list(request.observation.gauges())
    usage = registry.usage()
    if usage is not None:
        usage = dict(usage, repositories=len(usage["repositories"]))
        gauges += (USAGE_GAUGES % usage).splitlines()
    return Response(200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")],
                    request.observation.metrics.text(gauges).encode())


READINESS_WAIT = 5.0  # seconds; half of what load balancers commonly wait
READINESS = concurrent.futures.ThreadPoolExecutor(1)  # the thread that asks the disk


def get_health(registry: Registry, request: Request) -> Response:
    """That the server is alive."""
    return Response.of_text("ok\n")


def get_readiness(registry: Registry, request: Request) -> Response:
    """That the server can do its work: the store is there, has room, and can be written to unless
    it is read-only. Raises OSError, UNAVAILABLE.

    A network's disk that is away may answer nothing at all. So a thread asks, one at a time, and
    is not waited for without end."""
    check = READINESS.submit(registry.check_ready)
    try:
        check.result(READINESS_WAIT)
    except concurrent.futures.TimeoutError:  # the thread still waits for the disk
        check.cancel()
        raise RegistryError("UNAVAILABLE", message="the registry's disk has not answered for %g "
                            "seconds" % READINESS_WAIT)
    return Response.of_text("ready\n")


def ca_response(request: Request) -> Response:
    """The certificate of our CA, or 404 if there is none."""
    if not request.ca:
        return Response.of_text("404: this registry has no CA of its own\n", 404)
    return Response(200, [("Content-Type", "application/x-x509-ca-cert")], request.ca)


def get_ca(registry: Registry, request: Request) -> Response:
    """The CA's certificate. Everybody gets it: no client can log in before it trusts the CA."""
    return ca_response(request)


def handle_plain_http(request: Request) -> Response:
    """The response to a client that speaks HTTP at an HTTPS port: how to trust the registry, and
    nothing that could need a password."""
    host = request.header("host", "HOST")
    if request.path not in ("/", "/use", "/ca.crt") or request.method not in ("GET", "HEAD"):
        return Response.of_error(RegistryError(
            "UNSUPPORTED", status=400,
            message="Client sent an HTTP request to an HTTPS server; use https://%s, as "
            "http://%s/use says" % (host, host)))
    if request.path == "/ca.crt":
        return ca_response(request)
    text = "This registry speaks HTTPS: https://%s/\n" % host
    if request.ca:
        text += PLAIN_HTTP_HELP.format(host, fingerprint(request.ca))
    return Response.of_text(text)


ROUTES += compile_routes([
    Route("GET HEAD /", "pull", get_page),
    Route("GET HEAD /disk", "watch", disk_page),
    Route("GET HEAD /use", "look", use_page),
    Route("GET HEAD /use/{client}[.]sh", "look", use_script),
    Route("GET HEAD /login", "login", log_in),
    Route("GET HEAD /archive/(?P<name>[^:@]+)[:@]{reference}[.]tar", "pull", get_archive),
    Route("GET HEAD /tinyreg.py", "look", get_own_source),
    Route("GET HEAD /live", "watch", live_page),
    Route("GET HEAD /live/events", "watch", live_events),
    Route("GET HEAD /metrics", "look", get_metrics),
    Route("GET HEAD /healthz", "look", get_health),
    Route("GET HEAD /readyz", "look", get_readiness),
    Route("GET HEAD /ca.crt", "look", get_ca),
])

# -------------------------------------------------------------------------------------------------
# 18  Server
#
# Sockets, on the frame of http.server: Server takes connections, Connection reads requests and
# sends responses. What is stricter than http.server follows RFC 9112 to the letter, because a
# request that two parsers read differently is how requests are smuggled past a proxy. What is
# faster keeps small responses in memory and lets every thread of every process accept. One thread
# serves a connection; every wait has a limit. What a response says is decided in the room of the
# API.
# -------------------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"([A-Z]{1,32}) ([!-~]+) HTTP/(1\.[01])")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
BARE_NEWLINE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
TLS_HANDSHAKE = b"\x16"  # the first byte that a client sends when it speaks TLS
NOTHING_YET = (BlockingIOError, socket.timeout)  # after TICK seconds; the latter from behind TLS
CLIENT_GONE = (ClientLeft, ConnectionError, ssl.SSLError,  # SSLError: it sent what is not TLS
               socket.timeout)

# Headers that decide where a request ends, whom it is for or who sent it: one of each at most.
SINGLE_HEADERS = ("authorization", "content-length", "content-range", "host", "transfer-encoding")


def bad_request(message: str, status: int = 400) -> RegistryError:
    """The error for bytes that are not HTTP, or are HTTP that we refuse. The connection is closed
    after it."""
    return RegistryError("UNSUPPORTED", message=message, status=status)


def check_framing(version: str, headers: Dict[str, str]) -> None:
    """Refuse a request that leaves open where it ends, or whom it is for. Raises RegistryError."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise bad_request("Content-Length must be one number")
    if coding is not None and (length is not None or version != "1.1"):
        raise bad_request("Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
    if coding is not None and coding.lower() != "chunked":
        raise bad_request("no Transfer-Encoding but chunked", 501)
    if version == "1.1" and "host" not in headers:
        raise bad_request("no Host header")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise bad_request("no expectation but 100-continue", 417)


class RequestHead(NamedTuple):
    """The request line and the headers; names in lower case, values of repeated headers joined by
    commas."""

    method: str
    target: str
    version: str
    headers: Dict[str, str]


def check_lines(head: Union[bytes, bytearray], searched: int = 0) -> None:
    """Refuse what is no request's head, and can't become one. Raises RegistryError.

    The bytes before `searched` were checked earlier: to search them again for each byte that a
    client sends alone would take a worker's time."""
    if head.startswith(TLS_HANDSHAKE):
        # The response must begin with "HTTP/". Then Go's clients say "server gave HTTP response
        # to HTTPS client", and those that were told that the registry is insecure fall back to
        # HTTP.
        raise bad_request("this is an HTTP port, not an HTTPS one")
    if len(head) > MAX_HEAD:
        raise bad_request("the header block is longer than 64 KiB", 431)
    if len(head) > MAX_REQUEST_LINE and head.find(b"\r\n", 0, MAX_REQUEST_LINE + 2) < 0:
        raise bad_request("the request line is longer than 8 KiB", 414)
    ends = {head.count(end, searched) for end in (b"\r\n", b"\r", b"\n")}
    if len(ends) > 1 and BARE_NEWLINE.search(head, searched):  # to count is less work
        raise bad_request("lines must end with CR LF")


def parse_head(head: bytes) -> RequestHead:
    """Parse a request's head, its closing empty line included. Raises RegistryError."""
    check_lines(head)
    lines = head[:-4].split(b"\r\n")
    match = REQUEST_LINE.fullmatch(lines[0])
    if not match:
        raise bad_request("not an HTTP/1.1 request line")
    headers = {}  # type: Dict[str, str]
    for line in lines[1:]:
        field = HEADER_LINE.fullmatch(line)
        if not field:
            raise bad_request("malformed header line")
        name, value = field[1].decode().lower(), field[2].decode("latin-1").strip(" \t")
        if name in headers:
            if name in SINGLE_HEADERS:
                raise bad_request("more than one %s" % name)
            value = headers[name] + ", " + value
        headers[name] = value
    method, target, version = [part.decode() for part in match.groups()]
    check_framing(version, headers)
    return RequestHead(method, target, version, headers)


class Pace:
    """Disconnects slow clients: over each 30 seconds spent waiting for one, 1 KiB a second must
    move."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.moved = 0

    def call(self, function: Callable[..., int], *arguments: Any) -> Optional[int]:
        """Call a socket function that the client can hold up.

        Returns the number of bytes that it moved, None if nothing moved for TICK seconds. Raises
        ClientLeft."""
        start = time.monotonic()
        try:
            moved = function(*arguments)  # type: Optional[int]
        except NOTHING_YET:
            moved = None
        except CLIENT_GONE:
            raise ClientLeft("reset")
        self.moved += moved or 0
        self.waited += time.monotonic() - start
        if self.waited > PACE_WINDOW:
            if self.moved < PACE_BYTES:
                raise ClientLeft("too slow")
            self.waited, self.moved = 0.0, 0
        return moved


def limit_waits(sock: socket.socket, seconds: float) -> None:
    """Let each call of a socket that waits so long raise BlockingIOError.

    A time-out of Python's own takes another system call each time; and accept() would wait in
    poll(), where every connection wakes the threads of all processes."""
    sock.setblocking(True)
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


class RequestReader:
    """The client's bytes, behind a buffer: the `rfile` of a Connection. A socket without data
    raises NOTHING_YET after TICK seconds."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.buffer = bytearray()  # deleting from its front moves nothing
        self.pace = Pace()

    def read_head(self) -> Optional[bytes]:
        """Read up to the empty line that ends a header block.

        Returns None if the client closes the connection, or sends nothing for IDLE_LIMIT. Raises
        RegistryError for a head that is too long, too slow or a TLS handshake; ClientLeft."""
        began, first, searched = time.monotonic(), None, 0
        while True:
            while self.buffer.startswith(b"\r\n"):
                del self.buffer[:2]  # RFC 9112, 2.2: skip empty lines before a request
            if self.buffer:
                first = first or time.monotonic()
                end = self.buffer.find(b"\r\n\r\n", max(searched - 3, 0)) + 4
                if 4 <= end <= MAX_HEAD:
                    return self._take(end)
                check_lines(self.buffer, max(searched - 1, 0))
                if time.monotonic() - first > HEAD_LIMIT:
                    raise bad_request("the request took longer than 20 seconds to arrive", 408)
                searched = len(self.buffer)
            elif time.monotonic() - began > IDLE_LIMIT:
                return None
            try:
                received = self.sock.recv(MAX_HEAD)
            except NOTHING_YET:
                continue
            if not received:
                if self.buffer:
                    raise ClientLeft("left in the middle of a request")
                return None
            self.buffer += received

    def _take(self, count: int) -> bytes:
        """Remove the first `count` bytes of the buffer and return them."""
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def _receive(self, view: Any) -> int:
        """Wait for at least one byte of a body, unless `view` has no room. Raises ClientLeft."""
        received = None
        while received is None:
            received = self.pace.call(self.sock.recv_into, view)
        if not received and len(view):
            raise ClientLeft("left in the middle of a body")
        return received

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte of a body, unless `view` has no room. Raises ClientLeft."""
        if not self.buffer:
            return self._receive(view)
        block = self._take(len(view))
        view[:len(block)] = block
        return len(block)

    def readline(self, limit: int) -> bytes:
        """Read a line that ends with CR LF; returns it without them. Raises RegistryError,
        ClientLeft."""
        while True:
            end = self.buffer.find(b"\n", 0, limit + 2) + 1
            if end:
                break
            if len(self.buffer) > limit + 1:
                raise bad_request("a line of a chunked body is too long")
            block = bytearray(MAX_HEAD)
            self.buffer += block[:self._receive(block)]
        line = self._take(end)
        if not line.endswith(b"\r\n"):
            raise bad_request("lines must end with CR LF")
        return line[:-2]

    def check_client(self) -> None:
        """Raises ClientLeft if the client has closed the connection, or its sending side: few do
        that and wait for the response."""
        poll = select.poll()
        poll.register(self.sock, getattr(select, "POLLRDHUP", 0))  # errors are reported unasked
        if poll.poll(0):
            raise ClientLeft("left before the response")


class RequestBody:
    """The body of a request, of a known length or in chunks (None). `finished` is set once its end
    has been read."""

    def __init__(self, reader: RequestReader, length: Optional[int],
                 send_continue: Optional[Callable[[], Any]] = None) -> None:
        self.reader = reader
        self.left = length or 0  # bytes of the body, or of the present chunk
        self.sizes = self._iter_sizes() if length is None else iter([0])  # of what follows it
        self.send_continue = send_continue  # called before the first read
        self.received = 0
        self.is_empty = self.finished = length == 0

    def _iter_sizes(self) -> Iterator[int]:
        """Yield the size of each chunk, once the one before it was read; 0 at the end."""
        while True:
            match = CHUNK_LINE.fullmatch(self.reader.readline(MAX_CHUNK_LINE))
            if not match:
                raise bad_request("malformed chunk")
            size = int(match[1], 16)
            if not size:
                break
            yield size
            if self.reader.readline(0):
                raise bad_request("a chunk is longer than it says")
        limit, trailer = MAX_HEAD, b"-"  # no client sends in trailers what a registry needs
        while trailer:
            trailer = self.reader.readline(limit)
            limit = max(limit - len(trailer), 0)
        yield 0

    def readinto(self, view: memoryview) -> int:
        """Read some bytes of the body, 0 at its end. Raises RegistryError for malformed chunks,
        ClientLeft."""
        if self.finished:
            return 0
        if self.send_continue:
            self.send_continue()
            self.send_continue = None
        if not self.left:
            size = next(self.sizes, None)
            if size is None:
                raise bad_request("there is no body behind a malformed chunk")
            self.left, self.finished = size, not size
        count = self.reader.readinto(view[:self.left])
        self.left -= count
        self.received += count
        return count

    def drain(self) -> bool:
        """Read to the end if little is left and the client does not wait for a 100; whether the end
        was reached."""
        view, budget = memoryview(bytearray(1 << 16)), MAX_DRAIN
        while not self.finished and self.left <= budget > 0 and not self.send_continue:
            budget -= max(self.readinto(view), 1)
        return self.finished


# TLS. The certificates are the user's own, or ours: then there is a CA, which clients are told to
# trust, and a certificate of the server, which is made anew in time and when the host gets another
# name or address. The openssl command makes both.

SERVER_DAYS, RENEW_DAYS = 397, 60  # Apple's clients trust no certificate for longer than 398 days
EARLY_DAYS = 7                     # of them lie in the past, for clients whose clocks are behind
NO_END = 253402300799              # the end of 9999, which RFC 5280 (4.1.2.5) has for "no end"
CERTIFICATES = """\
[req]
distinguished_name = subject
prompt = no
string_mask = utf8only
[subject]
CN = %s
[ca]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = %s
[authority]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = policy
[policy]
commonName = supplied
"""


def host_names() -> Set[str]:
    """The names and addresses by which clients may know this host.

    They come from /etc/hosts and the network interfaces: DNS may be far, or wrong."""
    name = socket.gethostname()
    names = {"localhost", "127.0.0.1", "::1", name}
    hosts = (read_file("/etc/hosts", 1 << 20) or b"").decode("utf-8", "replace")
    for line in hosts.splitlines():
        words = line.partition("#")[0].split()
        if name in words:
            names.update(words)
    for command in (["ip", "-o", "addr"], ["ifconfig", "-a"]):
        # Each system has one of the two.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    timeout=10).stdout.decode("utf-8", "replace")
            names.update(re.findall(r"inet6? (?:addr:)? ?([0-9a-f.:]+)", output))
    # A link-local address is no use in a certificate: clients add the name of their interface.
    return {text for text in names
            if re.fullmatch(r"[0-9A-Za-z_.:-]+", text) and not text.startswith("fe80:")}


def alternative_names(names: Iterable[str]) -> str:
    """These names and addresses in the form of subjectAltName. Raises CommandError."""
    entries = []
    for name in sorted(names):
        kind, pattern = "IP", "[0-9A-Fa-f.:]+"  # without the scope that ipaddress takes
        try:
            ipaddress.ip_address(name)
        except ValueError:
            kind, pattern = "DNS", "(?![0-9.]+$)[0-9A-Za-z_.*-]+"
        if not re.fullmatch(pattern, name):
            raise CommandError("%r is no name or address to make a certificate for; write it "
                               "without scheme and port: registry.lab" % name)
        entries.append("%s:%s" % (kind, name))
    return ",".join(entries)


def is_valid(path: str, days: int) -> bool:
    """Whether a certificate is valid now, by this machine's clock, and for so many days to come."""
    output = openssl("x509", "-noout", "-dates", "-in", path, check=False) or ""
    dates = [ssl.cert_time_to_seconds(date) for date in re.findall("=([^=\n]*GMT)", output)]
    return len(dates) == 2 and dates[0] <= time.time() <= dates[1] - days * 86400


def certificate_date(moment: float) -> str:
    """A Unix time as `openssl ca` takes it in all its versions; 0 where it is before that."""
    date = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(max(moment, 0)))
    return date[2:] if date < "2050" else date


def sign(folder: str, extensions: str, first: float, last: float, *signer: str) -> bytes:
    """Sign the `request` in a folder, to be valid between two Unix times; returns the certificate.

    Raises CommandError, OSError."""
    openssl("ca", "-batch", "-notext", "-config", "config", "-name", "authority",
            "-extensions", extensions, "-startdate", certificate_date(first),
            "-enddate", certificate_date(last), "-in", "request", "-out", "crt", *signer,
            folder=folder)
    return read_file(os.path.join(folder, "crt")) or b""


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256",
           "-config", "config")


def make_ca(files: Files, folder: str, work: str) -> None:
    """Put a CA into `folder` that is valid at any time: no wrong clock makes clients distrust it.

    A CA of an earlier version has dates: it keeps its key and its name. Raises CommandError,
    OSError."""
    key, certificate = os.path.join(folder, "ca.key"), os.path.join(folder, "ca.crt")
    request = ("x509", "-x509toreq", "-in", certificate, "-signkey", key, "-out", "request")
    if openssl(*request, folder=work, check=False) is None:
        for path in (certificate, os.path.join(folder, "server.pem")):  # another key's
            with contextlib.suppress(FileNotFoundError):  # the first start has neither
                os.unlink(path)
        name = "/CN=tinyreg CA %s" % os.urandom(4).hex()
        openssl("req", "-new", "-subj", name, "-keyout", "ca.key", "-out", "request", *NEW_KEY,
                folder=work)
        # A crash before the certificate is there: both are made anew.
        files.write(key, read_file(os.path.join(work, "ca.key")) or b"", private=True)
    files.write(certificate, sign(work, "ca", 0, NO_END, "-selfsign", "-keyfile", key))


def make_server_certificate(folder: str, work: str, config: bytes) -> bytes:
    """The content of server.pem: what it is made from, its key, and the certificate."""
    openssl("req", "-new", "-keyout", "server.key", "-out", "request", *NEW_KEY, folder=work)
    begin = time.time() - EARLY_DAYS * 86400
    certificate = sign(work, "server", begin, begin + SERVER_DAYS * 86400,
                       "-cert", os.path.join(folder, "ca.crt"),
                       "-keyfile", os.path.join(folder, "ca.key"))
    return config + (read_file(os.path.join(work, "server.key")) or b"") + certificate


def make_certificates(files: Files, folder: str, names: Iterable[str]) -> None:
    """See to it that `folder` has a CA and a certificate that it made for these names.

    They are ca.key, ca.crt, and server.pem with its key. Each is made if it is missing, or ends
    soon. Raises CommandError, OSError."""
    folder = os.path.abspath(folder)
    make_directories(folder)
    server = os.path.join(folder, "server.pem")
    config = (CERTIFICATES % ("tinyreg", alternative_names(names))).encode()
    with alone(os.path.join(folder, "lock")):
        has_ca = is_valid(os.path.join(folder, "ca.crt"), SERVER_DAYS)
        same_names = (read_file(server) or b"").startswith(config)
        if has_ca and same_names and is_valid(server, RENEW_DAYS):
            return
        with tempfile.TemporaryDirectory(dir=files.scratch) as work:
            serial = os.urandom(15).hex().encode()
            for name, content in (("config", config), ("index", b""), ("serial", serial)):
                with open(os.path.join(work, name), "wb") as file:
                    file.write(content)
            if not has_ca:
                make_ca(files, folder, work)
            files.write(server, make_server_certificate(folder, work, config), private=True)


def tls_problem(certificate: str, key: Optional[str], client_ca: Optional[str]) -> str:
    """What is wrong with files that openssl refuses, often with no more than "PEM lib"; "" if
    nothing is to be seen. Raises OSError."""
    needed = [("certificate", certificate, b"CERTIFICATE-----"),
              ("key", key or certificate, b"PRIVATE KEY-----"),
              ("certificate", client_ca or certificate, b"CERTIFICATE-----")]
    for kind, path, mark in needed:
        content = read_file(path) or b""
        if mark not in content:
            is_unnamed = kind == "key" and not key
            return "there is no %s in %s, as PEM%s" % (
                kind, path, "; name its file with --tls-key" if is_unnamed else "")
        if kind == "key" and b"ENCRYPTED" in content:
            return ("the key in %s has a password; take it off with: openssl pkey -in %s -out FILE"
                    % (path, shlex.quote(path)))
    return ""


class Certificates:
    """The certificates that a server's TLS uses. Files that change are read again.

    `renew`, if given, is called every hour. `ca` is the content of the CA's certificate, if it is
    ours to give out. Raises OSError, CommandError."""

    def __init__(self, certificate: str, key: Optional[str] = None,
                 client_ca: Optional[str] = None, ca: Optional[str] = None,
                 renew: Optional[Callable[[], None]] = None) -> None:
        self.files = (certificate, key, client_ca)
        self.ca_file = ca
        self.renew = renew
        self.next_renewal = time.monotonic() + 3600
        self.watch = Watch(certificate, key, client_ca, ca)
        self._load()

    def _load(self) -> None:
        certificate, key, client_ca = self.files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if hasattr(ssl, "TLSVersion"):  # since 3.7; the other way warns there
            context.minimum_version = ssl.TLSVersion.TLSv1_2  # novermin
        else:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        try:
            # Without the empty password openssl would ask for one on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
            if client_ca:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # an SSLError is one; its strerror is longer than its reason
            reason = getattr(error, "reason", None) or error.strerror
            if isinstance(error, ssl.SSLError):
                reason = tls_problem(*self.files) or reason
            if reason == "KEY_VALUES_MISMATCH":
                reason = "the key is not that of the certificate"
            files = ", ".join(file for file in self.files if file)
            raise CommandError("can't use %s for TLS: %s" % (files, reason))
        self.ca = read_file(self.ca_file) if self.ca_file else None
        self.context = context

    def current(self) -> ssl.SSLContext:
        """The context for one more connection.

        If a certificate can't be renewed or read, the former one stays in use."""
        try:
            if self.renew and time.monotonic() > self.next_renewal:
                self.next_renewal = time.monotonic() + 3600
                self.renew()
            if self.watch.changed():
                self._load()
        except (OSError, CommandError) as error:
            logger.error("the former certificate stays in use: %s", error)
        return self.context


class CachedResponses:
    """Small responses that are valid under one mark: all of their bytes, and their log entries, by
    the exact bytes of the request's head and who sent it."""

    def __init__(self, mark: Any) -> None:
        self.mark = mark
        self.responses: Dict[Tuple[Any, bytes], Tuple[bytes, Exchange]] = {}
        self.size = 0

    def put(self, asker: Any, head: bytes, content: bytes, exchange: Exchange) -> None:
        size = len(head) + len(content)
        if len(content) <= SMALL_BLOB * 2 and self.size + size <= MAX_CACHED:
            self.size += size
            self.responses[asker, head] = content, exchange


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """A Unix time as the Date header has it."""
    return email.utils.formatdate(second, usegmt=True)


def too_many_connections(client: str) -> RegistryError:
    return RegistryError.too_many(5, "too many connections from %s" % client)


class Connection(http.server.BaseHTTPRequestHandler):
    """One client's connection: reads its requests, has each handled, and sends the responses.

    http.server gives the loop over requests (handle), the head of a response (send_response,
    send_header, end_headers) and the meaning of close_connection. Ours are the parser, for theirs
    repairs what we must refuse (a bare LF, folded lines, two Content-Lengths); the limits on time;
    cached responses; sendfile."""

    server: "Server"
    headers: Any  # a dict, with names in lower case
    rfile: Any
    wfile: Any
    connection: Any
    request_version = "HTTP/1.1"
    network = ""          # that of the client whose connection it is, for the limits
    speaks_plain = False  # whether the client speaks HTTP to a server of HTTPS
    certificate: Optional[str] = None  # the user named by its TLS certificate
    sent = 0              # bytes of the present response's body

    def setup(self) -> None:
        """Prepare the socket. Their buffered files would copy every byte once more, and know no
        time limits."""
        self.worker = self.server.worker
        self.client = str(find_address(self.client_address[0]))
        self.is_proxy = is_proxy(self.client, self.worker.proxies)
        self.idle_since: Optional[float] = time.monotonic()  # None while it serves a request
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_waits(self.connection, TICK)
        self.rfile = RequestReader(self.connection)
        # The head of a response gathers here: it leaves in one write with a small body.
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        self.worker.crowd.remove(self)
        self.connection.close()

    def handle(self) -> None:
        """Serve the client until it leaves, as theirs does, behind TLS if the server speaks it."""
        excess = self.worker.crowd.count(self, self.client)
        if excess > 0:
            # Each refusal takes a thread, so not all are told.
            if not self.worker.tls and excess <= self.worker.crowd.room // 16:
                self._refuse_crowd()
            return
        if self.worker.tls:
            self._start_tls(self.worker.tls.current())
        super().handle()

    def _refuse_crowd(self) -> None:
        """Say why, but not before the client has asked: Go's clients drop a response that comes
        before that."""
        # The client may be no better than its neighbours.
        with contextlib.suppress(ClientLeft, RegistryError):
            if self.rfile.read_head():
                self.send_refusal(too_many_connections(self.client))

    def _start_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands, unless the client speaks plain HTTP. Raises OSError, ClientLeft."""
        self.connection.settimeout(HANDSHAKE_LIMIT)
        first = self.connection.recv(1, socket.MSG_PEEK)
        if not first:
            raise ClientLeft("no TLS handshake")
        self.speaks_plain = first != TLS_HANDSHAKE
        if self.speaks_plain:
            return self.connection.setblocking(True)
        self.connection = self.rfile.sock = context.wrap_socket(
            self.connection, server_side=True, do_handshake_on_connect=False)
        try:
            self.connection.do_handshake()
        except OSError as error:  # most often a client that doesn't trust the CA: worth a line
            logger.warning("%s: no TLS handshake: %s", self.client, reason_of(error))
            self._record_refusal("TLS")
            raise ClientLeft("no TLS handshake")
        self.connection.settimeout(TICK)
        subject = (self.connection.getpeercert() or {}).get("subject", ())
        names = [value for part in subject for field, value in part if field == "commonName"]
        if len(names) == 1 and USER.fullmatch(names[0]):
            self.certificate = names[0]

    def _shut(self, how: int) -> None:
        """Shut one direction down. That of an SSLSocket would let other threads go on in plain
        text. Raises OSError."""
        socket.socket.shutdown(self.connection, how)

    # Requests

    def handle_one_request(self) -> None:
        """Read one request and respond to it. Afterwards close_connection tells whether to expect
        another."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        try:
            head = self.rfile.read_head()
        except RegistryError as error:  # of a head that is no HTTP, or too slow
            return self.send_refusal(error)
        if head is None:
            return
        self.started, self.idle_since = time.monotonic(), None
        self.raw_requestline = head
        # Who sends the head of a request, as far as that changes what it means.
        asker = self.certificate, self.client if self.is_proxy else None
        cached = self.worker.current_responses()
        response = cached.responses.get((asker, head))
        if response and not self.speaks_plain and not self.worker.stopping:
            self._send_cached(*response)
        elif self.parse_request():
            self._respond(functools.partial(cached.put, asker, head))
        self.idle_since = time.monotonic()

    def _send_cached(self, content: bytes, exchange: Exchange) -> None:
        """Send a response again."""
        self.close_connection = False  # only responses that leave the connection open are kept
        self._send_all(content)
        client = exchange.client if self.is_proxy else self.client
        seconds = time.monotonic() - self.started
        self.worker.observation.record(
            exchange._replace(client=client, seconds=seconds), cached=True)

    def parse_request(self) -> bool:
        """Parse the head, strictly; on an error the client has been told."""
        try:
            self.command, self.path, version, self.headers = parse_head(self.raw_requestline)
        except RegistryError as error:  # of a malformed head
            self.send_refusal(error)
            return False
        self.request_version = "HTTP/" + version
        wishes = re.findall("[^ \t,]+", self.headers.get("connection", "").lower())
        self.close_connection = "keep-alive" not in wishes if version == "1.0" else (
            "close" in wishes)
        return True

    def _respond(self, keep: Callable[[bytes, Exchange], None]) -> None:
        """Have the request handled, send the response, and keep that in memory if it may be
        repeated."""
        body, request = self._make_request()
        response = Response(CLIENT_LEFT)  # until there is another
        content, self.sent = None, 0
        try:
            response = self._handle(request)
            self._decide_to_close(response, body)
            content = self.send(response)
        finally:
            if not isinstance(response.body, bytes):
                response.body.close()
            exchange = self._exchange(request, response, body)
            self.worker.observation.record(exchange)
        may_repeat = response.is_repeatable and response.status == 200 and body.is_empty
        if content and may_repeat and not self.close_connection:
            keep(content, exchange)
        if self.close_connection and not body.finished:
            self._linger()

    def _make_request(self) -> Tuple[RequestBody, Request]:
        waits = "expect" in self.headers and self.request_version == "HTTP/1.1"
        is_chunked = "transfer-encoding" in self.headers
        body = RequestBody(self.rfile,
                           None if is_chunked else int(self.headers.get("content-length", 0)),
                           self.handle_expect_100 if waits else None)
        tls, forwarded = self.worker.tls, self.headers.get("x-forwarded-for", "")
        client = client_behind(self.client, forwarded, self.worker.proxies)
        request = Request(self.command, self.path, self.headers, body, client,
                          "https" if tls else "http", self.certificate, tls.ca if tls else None,
                          self.request_version[-3:])
        request.observation = self.worker.observation
        request.check_wanted = self.rfile.check_client
        return body, request

    def _handle(self, request: Request) -> Response:
        """The response to a request; a small blob as bytes, which leave in one write with the
        head."""
        if self.speaks_plain:
            return handle_plain_http(request)
        client = request.client
        if client_key(client) != self.network and self.worker.crowd.count(self, client) > 0:
            return Response.of_error(too_many_connections(client))
        response = for_people(
            request, dispatch(self.worker.registry, self.worker.access, request))
        blob = response.body
        if isinstance(blob, Blob) and blob.file and blob.length <= SMALL_BLOB:
            with blob:
                response.body = blob.read()
        return response

    def _decide_to_close(self, response: Response, body: RequestBody) -> None:
        """Close after this response if the server stops, or nobody could tell where the next
        request begins."""
        drained = False
        with contextlib.suppress(RegistryError):  # a malformed chunk
            drained = body.drain()
        endless = response.length is None and self.request_version == "HTTP/1.0"
        if self.worker.stopping or not drained or endless:
            self.close_connection = True

    def _exchange(self, request: Request, response: Response, body: RequestBody) -> Exchange:
        """What the log, the metrics and /live are told."""
        user = request.who.user if request.who else None
        return Exchange(
            client=request.client, user=user or "", method=self.command,
            target=without_secrets(self.path),
            route=request.route.name if request.route else "plain_http" * self.speaks_plain,
            name=request.path_values.get("name", ""),
            reference=request.path_values.get("reference") or request.path_values.get("digest", ""),
            status=response.status, received=body.received, sent=self.sent,
            seconds=time.monotonic() - self.started,
            digest=dict(response.headers).get("Docker-Content-Digest", ""),
            agent=self.headers.get("user-agent", ""), refusal=response.refusal)

    # Responses

    def send_response(self, code: int, message: Optional[str] = None) -> None:
        """Begin a response. Unlike theirs it logs nothing: a request is logged once its response
        was sent."""
        self.protocol_version = self.request_version
        self.send_response_only(code, message)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        # No browser shall take a blob for a page, or for a script of our page.
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Date", http_date(int(time.time())))

    def send_refusal(self, error: RegistryError) -> None:
        """Respond to what did not become a request, record it, and close."""
        self.close_connection = True
        # Go's fallback from HTTPS to HTTP, and clients that speak no HTTP, are told in the oldest
        # version.
        self.request_version = "HTTP/1.0" if error.status == 400 else "HTTP/1.1"
        self.command = "GET"
        self.send(Response.of_error(error))
        is_tls = self.rfile.buffer.startswith(TLS_HANDSHAKE)
        self._record_refusal("HTTPS" if is_tls else "-", error.status)
        self._linger()

    def _record_refusal(self, method: str, status: int = CLIENT_LEFT) -> None:
        """Tell the observers of what did not become a request."""
        self.worker.observation.record(
            Exchange(self.client, method=method, status=status, sent=self.sent))

    def handle_expect_100(self) -> bool:
        """Send 100 Continue. A handler that reads the body causes it: a refused client need not
        send one."""
        super().handle_expect_100()
        self._send_all(self._take_head())
        return True

    def send(self, response: Response) -> Optional[bytes]:
        """Send a response; returns all of its bytes, None if they were not all in memory.

        Raises OSError, RegistryError where the body can't be read, ClientLeft."""
        has_body = self.command != "HEAD" and response.status not in (204, 304)
        chunked = response.length is None and self.request_version == "HTTP/1.1"
        self.send_response(response.status, response.reason)
        for name, value in response.headers:
            self.send_header(name, value)
        if response.length is not None and response.status not in (204, 304):
            self.send_header("Content-Length", str(response.length))
        elif chunked:
            self.send_header("Transfer-Encoding", "chunked")
        if self.close_connection or self.request_version == "HTTP/1.0":
            self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        content = self._take_head()
        body = response.body if has_body else b""
        if isinstance(body, bytes):
            self._send_all(content + body)
            self.sent = len(body)
            return content + body
        self._send_all(content)
        self.sent = 0
        if isinstance(body, Stream):
            self._send_stream(body, chunked)
        else:
            self._send_blob(body)
        return None

    def _take_head(self) -> bytes:
        """Take what end_headers has written."""
        head = self.wfile.getvalue()
        self.wfile = io.BytesIO()
        return head

    def _send_all(self, content: Union[bytes, memoryview]) -> None:
        view, pace = memoryview(content), Pace()
        while view:
            count = pace.call(self.connection.send, view) or 0
            self.sent += count
            view = view[count:]

    def _send_blob(self, blob: Blob) -> None:
        """Send a blob; where there is no TLS the kernel copies it from the file to the socket."""
        if blob.file is None or self.worker.tls or not hasattr(os, "sendfile"):
            return copy_bytes(blob, blob.length, self._send_all)
        source, target = blob.file.fileno(), self.connection.fileno()
        offset, end, pace = blob.offset, blob.offset + blob.length, Pace()
        while offset < end:
            count = pace.call(os.sendfile, target, source, offset, min(end - offset, 1 << 30))
            if count == 0:
                raise OSError(errno.EIO, "a blob became shorter while it was sent")
            offset += count or 0
            self.sent += count or 0

    def _send_stream(self, stream: Stream, chunked: bool) -> None:
        """Send a body while it is made. If the server stops before its end, the client sees that
        the end lacks."""
        def send(block: bytes) -> None:
            if self.worker.stopping and stream.length is None:
                raise ClientLeft("the server stops")
            if block:
                self._send_all(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)

        stream.write_to(send)
        self._send_all(b"0\r\n\r\n" if chunked else b"")

    def _linger(self) -> None:
        """Read on for a while before closing: a reset would destroy our response to a client that
        still sends."""
        deadline, left = time.monotonic() + LINGER_LIMIT, MAX_LINGER
        with contextlib.suppress(OSError):  # the client has gone
            self._shut(socket.SHUT_WR)
            while left > 0 and time.monotonic() < deadline:
                try:
                    received = len(self.connection.recv(1 << 16))
                except NOTHING_YET:
                    continue
                if not received:
                    break
                left -= received

    def close_if_idle(self) -> None:
        """Wake a connection that waits for its next request, so that it ends."""
        if self.idle_since:
            self.idle_since = None
            with contextlib.suppress(OSError):  # it has just ended
                self._shut(socket.SHUT_RD)


def parse_listen(text: str) -> Tuple[str, int]:
    """[HOST]:PORT as (host, port); no host means every address. Raises CommandError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535 or ".." in text or text.startswith("."):
        raise CommandError("%r is no address: write HOST:PORT or :PORT, for example 127.0.0.1:5000 "
                           "or :5000" % text)
    return match[1] or match[2] or "", int(match[3])


def prepare_listener(sock: socket.socket) -> socket.socket:
    """Let a bound socket take connections, from several processes."""
    sock.listen(1024)
    limit_waits(sock, 1)  # then accept() returns, to see whether the server stops
    return sock


def _listen(family: int, address: Any, dual: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.bind(address)
        return prepare_listener(sock)
    except BaseException:  # whatever it is, the socket must not stay open
        sock.close()
        raise


def open_listeners(host: str, port: int) -> List[socket.socket]:
    """Listening sockets for an address; "" is every IPv4 and IPv6 address. Raises OSError."""
    if not host:
        with contextlib.suppress(OSError):  # a host without IPv6
            return [_listen(socket.AF_INET6, ("::", port), dual=True)]
        return [_listen(socket.AF_INET, ("0.0.0.0", port))]
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners, failure = [], None
    for family, address in sorted({(entry[0], entry[4]) for entry in entries}):
        try:
            listeners.append(_listen(family, address))
        except OSError as error:
            failure = error
    # localhost may be ::1 as well, on a host without IPv6: that one may fail.
    if failure and (failure.errno != errno.EADDRNOTAVAIL or not listeners):
        raise failure
    return listeners


def raise_file_limit() -> int:
    """Have as many files open as the host allows; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, 10240):  # macOS says "no limit", and takes no more than 10240
        with contextlib.suppress(OSError, ValueError):  # the former limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Server(http.server.HTTPServer):
    """One listening socket, and the threads of this process that take connections from it.

    HTTPServer takes connections in one thread and hands each to another. Here a thread waits for a
    connection, serves it to its end, and waits for the next; the last one that waits starts another
    thread before it serves. So a connection costs no thread, and the kernel hands connections out
    among all processes that listen."""

    def __init__(self, listener: socket.socket, worker: "Worker") -> None:
        super().__init__(listener.getsockname()[:2], Connection, bind_and_activate=False)
        self.socket.close()  # theirs, which is not bound
        self.socket = listener
        self.worker = worker
        self.waiting: Set[threading.Thread] = set()  # those in get_request

    def start_thread(self) -> None:
        """Start one more thread that takes connections. Raises RuntimeError if none can be had."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve connections, one after the other, until the worker stops or enough threads wait."""
        thread = threading.current_thread()
        if self.worker.observation.metrics.excess("connections"):
            # Of many clients that come at once the fastest process would get most; but its threads
            # would wait for each other, which takes more time than this.
            time.sleep(0.002)
        while len(self.waiting) < SPARE_THREADS and not self.worker.stopping:
            self.worker.crowd.await_closing()
            self.waiting.add(thread)
            try:
                client = self.get_request()
            except (BlockingIOError, ConnectionError):
                continue  # nobody came for a second, or has left already
            except OSError as error:  # out of files: connections that end give theirs back
                if not self.worker.stopping:
                    logger.error("can't accept a connection: %s", error)
                    time.sleep(0.05)
                continue
            finally:
                self.waiting.discard(thread)
            self.process_request(*client)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in this thread, and leave another one waiting."""
        metrics = self.worker.observation.metrics
        metrics.add("connections")
        try:
            if not self.waiting:
                self.start_thread()
            self.finish_request(request, client_address)  # a Connection, which serves the client
        except Exception:  # of one client's connection; handle_error logs it
            self.handle_error(request, client_address)
        finally:
            metrics.add("connections", -1)
            self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log why a connection ended, unless it is that the client left."""
        error = sys.exc_info()[1]
        if isinstance(error, CLIENT_GONE):
            return
        if isinstance(error, (OSError, RegistryError, RuntimeError)):
            logger.warning("%s: a response was cut: %s", client_address[0], error)
        else:
            logger.exception("%s: connection ended", client_address[0])


class Crowd:
    """The connections of one process: how many each client has, and which one makes room.

    A client may have MAX_CONNECTIONS, but no more than are left for all others. This machine may
    have all that are left, because it may be a proxy. When little is left, the connection that has
    waited longest for a request is closed."""

    def __init__(self) -> None:
        # A connection may open two files beside its socket.
        self.room = min(MAX_ALL_CONNECTIONS, raise_file_limit() // 3)
        self.connections: Set[Connection] = set()
        self.closing: Set[Connection] = set()  # to make room; their threads have not ended yet
        self.changed = threading.Condition()

    def count(self, connection: Connection, client: str) -> int:
        """Count a connection as this client's; returns by how many the client has too many."""
        with self.changed:
            connection.network = client_key(client)
            self.connections.add(connection)
            left = self.room - len(self.connections)
            if left < self.room // 4:
                self._close_longest_idle(connection)
            if is_this_machine(client):
                return -left
            size = sum(other.network == connection.network for other in self.connections)
            return size - min(MAX_CONNECTIONS, left)

    def _close_longest_idle(self, newest: Connection) -> None:
        idle = [other for other in self.connections - {newest} if other.idle_since]
        if idle:
            oldest = min(idle, key=lambda other: other.idle_since or 0)
            oldest.close_if_idle()
            self.connections.remove(oldest)
            self.closing.add(oldest)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        with self.changed:
            self.connections.discard(connection)
            self.closing.discard(connection)
            self.changed.notify_all()

    def await_closing(self) -> None:
        """Wait, a second at most, while many connections that are to close still have files."""
        few = self.room // 4
        if len(self.closing) > few:
            with self.changed:
                self.changed.wait_for(lambda: len(self.closing) <= few, 1)

    def await_end(self, seconds: float) -> int:
        """Let running transfers end, for so long; returns how many connections are left."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while self.connections and time.monotonic() < deadline:
                for connection in self.connections:
                    connection.close_if_idle()
                self.changed.wait(0.1)
            return len(self.connections)


class Worker:
    """What one process serves: a Server for each listening socket, and all that they share."""

    def __init__(self, listeners: List[socket.socket], registry: Registry, access: Access,
                 observation: Observation, drain: float = 30.0,
                 tls: Optional[Certificates] = None, proxies: Sequence[Network] = ()) -> None:
        self.registry = registry
        self.access = access
        self.observation = observation
        self.drain = drain  # seconds that running transfers get when the server stops
        self.tls = tls  # for a server that speaks HTTPS
        self.proxies = proxies  # networks whose X-Forwarded-For is believed
        self.stopping = False
        self.cached = CachedResponses(None)
        self.crowd = Crowd()
        self.servers = [Server(listener, self) for listener in listeners]

    def start(self) -> None:
        """Begin to accept; returns at once."""
        # Virtual memory: room for deeply nested JSON, where the C library's default stack is small.
        threading.stack_size(8 << 20)
        for server in self.servers:
            server.start_thread()

    def stop(self) -> int:
        """Accept nothing more, and let running transfers end; returns how many had to be cut."""
        self.stopping = True
        for server in self.servers:
            server.server_close()
        return self.crowd.await_end(self.drain)

    def current_responses(self) -> CachedResponses:
        """The responses that this process may send again. A new one belongs into those that were
        current before it was made.

        What many clients ask, and one client often, then costs two system calls. A response is
        valid while the registry's version is the one it was made under, whoever changes it; and for
        a second at most, since a password, a token or the Date may not last longer."""
        cached, version = self.cached, self.registry.version()
        mark = version, int(time.monotonic() / CACHE_LIFE)
        if mark != cached.mark or version is None:  # None: nothing may be sent again
            cached = self.cached = CachedResponses(mark)
        return cached


SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}


class Supervisor:
    """Runs work(0), work(1), … in processes of their own, and again if one dies.

    A signal ends all: SIGTERM and Ctrl-C reach the processes as SIGTERM, SIGHUP as itself; they get
    them from next_signal(). SIGHUP also calls `hang_up` in this process. A second Ctrl-C kills. The
    listeners are closed when the end begins: as long as one process has them open, the kernel takes
    connections that nobody will serve. This process has no threads, so it can fork at any time; and
    it keeps nothing but the processes' ids, so it has nothing to lose."""

    def __init__(self, work: Callable[[int], int], listeners: Sequence[socket.socket],
                 hang_up: Callable[[], None]) -> None:
        self.work = work
        self.listeners = listeners
        self.hang_up = hang_up
        self.running: Dict[int, int] = {}  # the number of its work, by process id
        self.stopping = False
        self.status = 0  # the highest exit status of those that have ended
        # The processes end when nobody holds the other end of this pipe any more.
        self.alive, self.lifeline = os.pipe()
        # Where SIGCHLD is ignored, it can't be waited for.
        signal.signal(signal.SIGCHLD, lambda *anything: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # from now on they wait for run()

    def run(self, processes: int) -> int:
        """Returns when all processes have ended: the highest of their exit statuses."""
        for number in range(processes):
            self._start(number)
        while self.running:
            number = signal.sigwait(SIGNALS)
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGINT and self.stopping:
                self._tell(signal.SIGKILL)
                self.status = 130
            elif number == signal.SIGHUP:
                self.hang_up()
                self._tell(number)
            else:
                self.stopping = True
                for listener in self.listeners:
                    listener.close()
                self._tell(signal.SIGTERM)
        return self.status

    def _start(self, number: int) -> None:
        sys.stdout.flush()
        process = os.fork()
        if process:
            self.running[process] = number
            return
        status = 1
        try:
            os.close(self.lifeline)
            threading.Thread(target=self._watch_parent, daemon=True).start()
            status = self.work(number)
        except Exception:  # a bug: the supervisor starts another process
            logger.exception("a worker process failed")
        finally:
            with contextlib.suppress(Exception):  # the process ends in any case
                sys.stdout.flush()
                logging.shutdown()
            os._exit(status)

    def _watch_parent(self) -> None:
        """End this process when its parent has died."""
        os.read(self.alive, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _reap(self) -> None:
        """Collect the processes that have ended. One that ended by itself is started again."""
        while self.running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            number = self.running.pop(process, None)
            if number is None:
                continue  # an orphan, which came to the first process of a container
            if self.stopping:
                self.status = max(self.status, status >> 8)
            else:
                logger.error("a worker process ended (status %d); starting another", status)
                time.sleep(0.1)  # if it dies at once, again and again
                self._start(number)

    def _tell(self, number: int) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)


def next_signal() -> int:
    """Wait in a supervised process for SIGTERM or SIGHUP; returns which.

    Ctrl-C reaches this process too, where nobody waits for it: the supervisor acts on it."""
    return signal.sigwait({signal.SIGTERM, signal.SIGHUP})

# -------------------------------------------------------------------------------------------------
# 19  Commands
#
# The command line. A command is a function from the parsed options to the exit status: 0 done, 1
# failed or damage found, 2 wrong command line. It prints what it reports on stdout, with --json in
# a shape that programs may rely on; what went wrong is one line on stderr that says what to do.
# Options and help are texts at the end; all else about images is in the rooms above.
# -------------------------------------------------------------------------------------------------


def fitted(text: str, file: Any) -> str:
    """The text with escapes for control characters, and for what the encoding of the file lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return harmless(text).encode(encoding, "backslashreplace").decode(encoding)


def tell(line: str) -> None:
    """Print a line on stdout. Strangers' text may be in it, so all output goes through this
    function, complain() or tell_progress()."""
    print(fitted(line, sys.stdout))


def complain(line: str) -> None:
    """Print a line on stderr, at once."""
    print(fitted(line, sys.stderr), file=sys.stderr, flush=True)


def tell_progress(line: str) -> None:
    """Show a line on the terminal in place of the last one; "" clears it."""
    columns = shutil.get_terminal_size().columns - 1
    sys.stderr.write("\r%s\x1b[K" % fitted(line, sys.stderr)[:columns])
    sys.stderr.flush()


def show(options: argparse.Namespace, report: Any, lines: Iterable[str]) -> None:
    """Print what a command reports: with --json the report, else the lines. The JSON is ASCII, so
    it is valid whatever strangers' text is in it."""
    if options.json:
        lines = json.dumps(report, indent=2).splitlines()
    for line in lines:
        tell(line)


def error_text(error: Exception) -> str:
    """What an error says; an OSError says of which file."""
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError):  # mostly a service meets what its admin has made
        reason += " (to uid %d)" % os.geteuid()
    return ": ".join(filter(None, [error.filename, reason]))


def flush_output() -> None:
    """Write what print() has kept in its buffer. Raises BrokenPipeError, CommandError.

    What can't be written is dropped. Python would try it again when it ends, and print an error
    of its own."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError("can't write the output: %s" % error.strerror)


# The store, and what serve needs


def find_root(path: str) -> Optional[str]:
    """The store that is meant by a folder inside it, or by that of its docker volume; None if the
    folder is a store itself, or there is none."""
    outside = re.sub("/docker(/registry(/v2)?)?$", "", path)
    for root in (path, outside, os.path.join(path, "_data")):
        if os.path.isdir(os.path.join(root, "docker", "registry", "v2")):
            return root if root != path else None
    return None


def open_store(options: argparse.Namespace, create: bool = False, renew: bool = True) -> Directory:
    """The store at --root; with `create`, it is made if it is not there. Raises CommandError."""
    if not options.root:  # a script whose variable is empty
        raise CommandError("--root '' names no directory")
    path = os.path.abspath(options.root)
    root = find_root(path)
    if root:
        raise CommandError("%s is no store, but %s is: write --root %s"
                           % (path, root, shlex.quote(root)))
    settings = {name: setting for name, setting in vars(options).items()  # those of serve
                if name in ("sparse", "min_free", "max_blob", "shared", "quota")}
    try:
        store = Directory(options.root, create=create, renew=renew, **settings)
        options.at_end.callback(store.journal.close)
        return store
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not create:
            raise CommandError("no registry is stored in %s; name its directory with --root" % path)
        raise CommandError("can't use %s as the store: %s; choose another directory with --root"
                           % (path, error.strerror))


def check_writable(store: Directory) -> None:
    """Raises CommandError if nothing can be stored: better at the start than at the first push."""
    try:
        store.files.probe()
    except OSError as error:
        advice = "choose another directory with --root"
        if isinstance(error, PermissionError):
            advice = "chown -R %d %s, or %s" % (os.geteuid(), shlex.quote(store.root), advice)
        raise CommandError("can't write to %s: %s; %s" % (store.root, error.strerror, advice))


SHARED_NOTE = (b"Several hosts have this directory open. When only one has it again, stop all "
               b"servers and delete this file.\n")

# They seem to work. But they don't lock, and rclone loses what it has not sent yet.
LOCKLESS_FILE_SYSTEMS = ("fuse.rclone", "fuse.s3fs", "fuse.sshfs")


def find_mount(path: str, table: str) -> Tuple[str, str]:
    """The type and the options of the file system that a path is on, from Linux's table of mounts
    (proc(5), mountinfo); empty texts without one."""
    place = kind = settings = ""
    mounts = (read_file(table, -1) or b"").decode("utf-8", "replace")
    for mount in re.finditer(r"^(?:\S+ ){4}(\S+) .* - (\S+) \S+ (.*)$", mounts, re.MULTILINE):
        # A blank in a path is written as \\040; no other character of it matters here.
        top = mount[1].replace("\\040", " ")
        is_above = (path + "/").startswith(top.rstrip("/") + "/")
        if is_above and len(top) >= len(place):  # of two mounts at one place the later one counts
            place, kind, settings = top, mount[2], mount[3]
    return kind, settings


def check_mount(root: str, table: str = "/proc/self/mountinfo") -> None:
    """Check what can be seen of the file system that several hosts share. Raises CommandError if
    it does not lock; logs a warning about an NFS mount that shows hosts old content."""
    kind, settings = find_mount(os.path.realpath(root), table)
    if kind in LOCKLESS_FILE_SYSTEMS:
        raise CommandError("%s is on %s, which does not lock files between hosts: images would be "
                           "lost; use NFS 4, CephFS or GlusterFS" % (root, kind))
    if not kind.startswith("nfs"):
        return
    if re.search(r"\bnolock\b|\blocal_lock=(?!none\b)", settings):
        logger.warning("%s is mounted without locks between hosts (nolock, local_lock): images "
                       "may be lost; mount it with vers=4.2,hard,actimeo=0", root)
    if not re.search(r"\bnoac\b|\bacregmax=0\b", settings):
        logger.warning("%s is mounted with attribute caching: for a minute a host may not see what "
                       "another has stored; mount it with actimeo=0", root)


def open_registry(options: argparse.Namespace) -> Tuple[Union[Archive, Directory], Registry]:
    """What serve serves: the archives, or the store; and the same behind the rules that clients
    meet. Raises CommandError, OSError; UNSUPPORTED for what is no archive."""
    if options.archives and options.upstream:
        raise CommandError("--upstream fills the store, which is not served beside archives; load "
                           "them into it")
    if options.archives:
        if options.archives[0].endswith((".yml", ".yaml")):
            raise CommandError("there is no configuration file: all settings are options, or "
                               "variables; see tinyreg.py serve --help")
        archive = Archive(options.archives)
        return archive, ReadOnly(archive)
    if options.signed_by and not options.upstream:
        raise CommandError("--signed-by is for what --upstream fetches; tinyreg.py verify "
                           "--signed-by checks what is in the store, or in archives")
    store = open_store(options, create=not options.read_only)
    registry: Registry = store
    if options.upstream:
        upstreams = {space: Upstream(Remote(host, plain_http=plain, retries=1, patience=5.0),
                                     prefix)
                     for space, host, plain, prefix in options.upstream}
        cache = registry = PullThrough(store, upstreams, options.upstream_ttl)
        if options.signed_by:
            registry = Signed(cache, sum(options.signed_by, []),
                              lambda name: cache.find_upstream(name)[0] is not None)
    if options.immutable_tags:
        registry = ImmutableTags(registry, options.immutable_tags, store.lock_repository)
    if store.shared:
        check_mount(store.root)
    if options.read_only:
        return store, ReadOnly(registry)
    check_writable(store)
    if options.shared:
        store.files.write(store.layout.shared, SHARED_NOTE)
    return store, registry


def inherited_listeners() -> List[socket.socket]:
    """The listening sockets that systemd has opened for us (sd_listen_fds), if it has. Raises
    CommandError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    listeners = []
    for descriptor in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
        os.set_inheritable(descriptor, False)
        # Python 3.6 takes each such socket for one of IPv4, but knows its address.
        probe = socket.socket(fileno=descriptor)
        address = probe.getsockname()
        if not isinstance(address, tuple):
            raise CommandError("systemd gave us a socket that is not TCP's: ListenStream= must be "
                               "a port or an address")
        family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
        listeners.append(prepare_listener(
            socket.socket(family, socket.SOCK_STREAM, fileno=probe.detach())))
    return listeners


def open_listeners_at(addresses: Iterable[Tuple[str, int]]) -> List[socket.socket]:
    """Listening sockets for all of --listen. Raises CommandError, with what to do if a port can't
    be had."""
    listeners: List[socket.socket] = []
    for host, port in addresses:
        try:
            listeners += open_listeners(host, port)
        except OSError as error:
            advice = {
                errno.EADDRINUSE: "is in use: another program, or another tinyreg, listens there; "
                "stop it or choose another port with --listen %s:%d"
                % (host, port + 1 if port < 65535 else 5000),
                errno.EACCES: "is for root only; choose a port above 1023 with --listen",
                errno.EADDRNOTAVAIL: "is no address of this machine; --listen :%d is all of them"
                % port}
            problem = advice.get(error.errno or 0, "can't be listened on: %s" % error.strerror)
            raise CommandError("%s:%d %s" % (host, port, problem))
    return listeners


def key_store(options: argparse.Namespace, store: Union[Archive, Directory]) -> Directory:
    """The store that has our own keys: that of --root, even if archives are served in its place."""
    return store if isinstance(store, Directory) else Directory(options.root)


def token_key(store: Directory) -> Optional[bytes]:
    """The key that signs tokens, the same for all servers of the store; made if it is not there.
    None if the store can't be written to: then each server makes a key of its own."""
    path = os.path.join(store.layout.own, "token.key")
    try:
        with alone(path + ".lock"):
            if not os.path.exists(path):
                store.files.write(path, os.urandom(32), private=True)
        return read_file(path)
    except OSError as error:
        logger.warning("tokens end with this server: %s", error)
        return None


def open_access(options: argparse.Namespace, store: Union[Archive, Directory],
                is_local: bool) -> Access:
    """The Access that the options of serve describe; `is_local` says that only this machine can
    connect. Raises OSError, CommandError."""
    if options.users or options.tls_client_ca:
        default = "none"
    else:
        default = "admin" if is_local else "pull"
    access = Access(options.anonymous or default, options.users, options.rules,
                    token_key(key_store(options, store)) if options.users else None,
                    only_local=not options.anonymous and default == "admin",
                    client_ca=options.tls_client_ca)
    if default != "none" and any(rule.user != "@anonymous" for rule in access.rules.rules):
        raise CommandError("--rules name users, and nobody can log in: add --users FILE")
    return access


def tls_folder(root: str) -> str:
    """Where the CA and the certificate are that serve --tls makes."""
    return os.path.join(root, "tinyreg", "tls")


def check_tls_options(options: argparse.Namespace) -> None:
    """Raises CommandError for options that don't go together."""
    certificate = options.tls_cert
    if options.tls_key and not certificate or certificate and options.tls:
        raise CommandError("--tls-key goes with --tls-cert, and --tls without both")
    if options.tls_client_ca and not (certificate or options.tls):
        raise CommandError("--tls-client-ca goes with --tls or --tls-cert")
    if options.tls_name and not options.tls:
        raise CommandError("--tls-name goes with --tls; a certificate of your own has its names")


def open_tls(options: argparse.Namespace,
             store: Union[Archive, Directory]) -> Optional[Certificates]:
    """The Certificates that the options of serve ask for; None without TLS. Raises OSError,
    CommandError."""
    check_tls_options(options)
    if options.tls_cert:
        return Certificates(options.tls_cert, options.tls_key, options.tls_client_ca)
    if not options.tls:
        return None
    if isinstance(store, Directory) and store.shared:
        raise CommandError("--tls makes a certificate for this host, and --shared has several: "
                           "give each the same one with --tls-cert, or let the load balancer "
                           "speak TLS")
    home = key_store(options, store)
    folder = tls_folder(home.root)
    # A scope (fe80::1%eth0) has no place in a certificate; the others mean every address.
    hosts = {host for host, _ in options.listen if "%" not in host} - {"", "0.0.0.0", "::"}

    def renew() -> None:
        make_certificates(home.files, folder, hosts | set(options.tls_name) | host_names())

    renew()
    return Certificates(os.path.join(folder, "server.pem"), None, options.tls_client_ca,
                        os.path.join(folder, "ca.crt"), renew)


def tell_systemd(state: str) -> None:
    """Report a state to systemd (sd_notify), if it has started us."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        # A systemd that can't be told is no reason not to serve. "@" means Linux' abstract names.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), re.sub("^@", "\0", path))


def feed_watchdog() -> None:
    """Tell systemd that this process runs, twice in the time after which systemd would kill it."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while interval:
        tell_systemd("WATCHDOG=1")
        time.sleep(interval)


def seconds_to_collection(store: Directory, every: float) -> float:
    """How many seconds until the next garbage collection, which may be overdue, or never come."""
    passed = time.time() - look_at(store.layout.collected).mtime
    # A file server's clock may be ahead by a little. If the last collection lies further in the
    # future, some clock was wrong then.
    return every - passed if passed >= -every else 0.0


def keep_up(store: Directory, every: float, grace: float) -> None:
    """Purge idle upload sessions once an hour, and collect garbage every so many seconds, until
    the process ends. Of several processes that share the store, one at a time does it."""
    while True:
        pause = UPKEEP_PERIOD
        try:
            if seconds_to_collection(store, every) <= 0:
                collect_garbage(store, grace=grace)
            else:
                Collection(store).purge()
            pause = min(pause, seconds_to_collection(store, every))
        except BlockingIOError:
            pass  # another process is at it
        except OSError as error:
            logger.error("garbage collection failed: %s", error)
        except Exception:  # a bug: without this the thread would end, and nothing be collected
            logger.exception("garbage collection failed")
        time.sleep(max(pause, 1.0))


def watch_root(store: Directory, is_gone: threading.Event) -> None:
    """Wait until the store is no longer at its place; then set `is_gone`, and end the server.

    Its disk was unmounted, or somebody has deleted it. A new store in its place would hide that,
    and what is pushed would go where nobody looks for it."""
    while True:
        with contextlib.suppress(OSError):  # the file system fails at present: that proves nothing
            if not look_at(store.layout.tree).inode:
                logger.error("%s is gone: deleted, or its disk was unmounted; the server ends",
                             store.layout.tree)
                is_gone.set()
                return os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(ROOT_CHECK_PERIOD)


def start_thread(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a thread that ends with the process."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


# serve

def all_tags(store: Reader) -> Iterator[Tuple[str, str, Digest]]:
    """(repository, tag, digest) of each tag."""
    return ((name, *tag) for name in store.repositories() for tag in iter_tags(store, name))


EVERY_ADDRESS = ("::", "0.0.0.0")


def host_and_port(host: str, port: int) -> str:
    """An address as it stands in a URL."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def outer_addresses(address: Tuple[str, int], is_local: bool, names: Sequence[str]) -> List[str]:
    """HOST:PORT by which clients reach what listens on an address; `names` are those in its
    certificate."""
    host, port = address
    hosts = [host]
    if is_local and (host == "127.0.0.1" or not host.startswith("127.")):
        hosts = ["localhost"]
    elif host in EVERY_ADDRESS:
        addresses = sorted(name for name in host_names()
                           if re.fullmatch(r"(?!127\.|169\.254\.)[0-9.]+", name))
        hosts = list(names) or addresses[:3] or [socket.gethostname()]
    return [host_and_port(host, port) for host in hosts]


BANNER = """\
tinyreg {version}
  listens on  {urls}
store|  stores in   {root}
archive|  serves      {root} (read-only)
lacking|  lacks       {lacking}, of which save --have left out {left_out}: what needs them can't \
be pulled from here; ls FILE says what does, load FILE takes it
ca|  CA          /ca.crt, SHA-256 {ca}
  access      {access}
caches|  caches      {caches}
unsafe|  beware      passwords cross the network in the clear; add --tls
push|  try         {login}docker tag alpine {host}/alpine && docker push {host}/alpine
push|              docker pull {host}/alpine
pull|  try         docker pull {host}/{image}
elsewhere|  elsewhere   {elsewhere} says what to do
  Ctrl-C ends it.
"""


class Service:
    """One run of serve: what its processes share, made before they are forked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        style = "off" if options.quiet else options.log
        start_logging(style)
        self.store, self.registry = open_registry(options)
        self.listeners = inherited_listeners() or open_listeners_at(
            options.listen or [("127.0.0.1", 5000)])
        self.addresses = [listener.getsockname()[:2] for listener in self.listeners]
        self.is_local = all(is_this_machine(host) for host, _ in self.addresses)
        self.access = open_access(options, self.store, self.is_local)
        self.tls = open_tls(options, self.store)
        self.hosts = outer_addresses(self.addresses[0], self.is_local,
                                     options.tls_name if self.tls else ())
        folder = self.store.layout.own if isinstance(self.store, Directory) else None
        words = {(method, route.name): route.words
                 for _, by_method in ROUTES for method, route in by_method.items()}
        self.observation = Observation(folder, style, words, options.notify, options.workers)
        self.observation.metrics_open = options.metrics_open
        self.root_is_gone = threading.Event()  # set in one process only
        if options.log_file:
            open_log_file(options.log_file)

    def reopen_log(self) -> None:
        """What SIGHUP asks for. Changed users, rules and certificates are noticed without it."""
        try:
            if self.options.log_file:
                open_log_file(self.options.log_file)
        except OSError as error:
            logger.error("the former log goes on: can't open %s: %s", self.options.log_file,
                         error.strerror)

    def start_upkeep(self) -> None:
        """Start the threads of which one process is enough."""
        start_thread(feed_watchdog)
        if isinstance(self.store, Directory):
            start_thread(watch_root, self.store, self.root_is_gone)
            if not self.registry.is_read_only:
                start_thread(keep_up, self.store, self.options.gc_every or float("inf"),
                             self.options.grace)

    def work(self, number: int) -> int:
        """Serve in this process until SIGTERM; returns its exit status."""
        self.reopen_log()  # if this process replaces one that died, the log may have been moved
        worker = Worker(self.listeners, self.registry, self.access, self.observation,
                        self.options.drain, self.tls, self.options.trusted_proxy)
        self.observation.start(number)
        worker.start()
        if isinstance(self.store, Directory):
            self.store.recover()  # this process may replace one that was killed
        if number == 0:
            self.start_upkeep()
        while next_signal() != signal.SIGTERM:
            self.reopen_log()
        tell_systemd("STOPPING=1")
        cut = worker.stop()
        if cut:
            logger.warning("stopped, and cut %s that did not end within %g s (--drain)",
                           counted(cut, "transfer"), self.options.drain)
        if isinstance(self.store, Directory):
            self.store.journal.close()
        return 1 if self.root_is_gone.is_set() else 0

    def banner(self) -> str:
        """What serve says first: where it listens and stores, who may do what, what to try."""
        store, host, scheme = self.store, self.hosts[0], "https" if self.tls else "http"
        urls = ["%s://%s%s" % (scheme, host_and_port(*address), " (every address of this machine)"
                               if address[0] in EVERY_ADDRESS else "")
                for address in self.addresses]
        reach = "whoever is on this machine" if self.is_local else "whoever can reach it"
        caches = ["%s from %s://%s/%s" % (space, "http" if is_plain else "https", host, prefix)
                  for space, host, is_plain, prefix in self.options.upstream]
        bound, port = self.addresses[0]
        if not self.tls and bound in EVERY_ADDRESS:  # docker takes plain HTTP from localhost alone
            host = "localhost:%d" % port
        takes_pushes = not self.registry.is_read_only and self.access.takes_pushes()
        images = iter(()) if takes_pushes else all_tags(store)
        lacking: Set[Digest] = set()
        left_out: Set[Digest] = set()
        if isinstance(store, Archive):
            images, lacking = store.images(), store.lacking()
            left_out = lacking & store.parts.left_out
        name, reference, _ = next(images, ("alpine", "latest", None))
        next_line = "\n" + 14 * " "
        return "".join(render(BANNER, dict(
            version=__version__, urls=", ".join(urls), root=store.root,
            store=isinstance(store, Directory), archive=isinstance(store, Archive),
            lacking=lacking and counted(len(lacking), "blob"), left_out=len(left_out),
            ca=self.tls and self.tls.ca and fingerprint(self.tls.ca),
            access=next_line.join(self.access.in_words(reach, self.registry.is_read_only)),
            caches=next_line.join(caches), host=host,
            unsafe=self.access.users_file and not self.tls and not self.is_local,
            push=takes_pushes, pull=not takes_pushes, image=image_text(name, reference),
            login="docker login %s && " % host if self.access.users_file else "",
            elsewhere=not self.is_local and " or ".join(
                "%s://%s/use" % (scheme, host) for host in self.hosts))))


def serve(options: argparse.Namespace) -> int:
    """Serve the store, or archives, until a signal ends it."""
    service = Service(options)
    supervisor = Supervisor(service.work, service.listeners, service.reopen_log)
    lines = service.banner().splitlines()
    if options.log == "json" and not options.log_file:  # who collects both reads nothing but JSON
        message = "; ".join(" ".join(line.split()) for line in lines[:-1])
        lines = [json_line(level="info", message=message, trace=[])]
    for line in lines:
        tell(line)
    flush_output()
    tell_systemd("READY=1")
    return supervisor.run(options.workers)


# Images of the store


MANY = 100       # images: so many that a pattern may match without a word …
MOST = 10000     # … and in one repository of another registry at all


def chosen_filter(options: argparse.Namespace) -> Filter:
    """The Filter that the options of CHOICE ask for."""
    return Filter(options.exclude, options.newest, options.versions)


def named_images(options: argparse.Namespace) -> List[Choice]:
    """The images that the command line and the files of -f name. Raises CommandError for none."""
    choices = read_choices(options.images, options.file)
    if not choices:
        raise CommandError("no image is named; write for example alpine:3.19, or name a list of "
                           "images with -f FILE")
    if chosen_filter(options).narrows() and not any("*" in choice.image for choice in choices):
        raise CommandError("--newest and --versions choose among the tags that a pattern fits; "
                           "write for example 'alpine:3.*'")
    return choices


def complain_of(image: str, reason: object) -> None:
    """Say on stderr why an image is left out."""
    complain("tinyreg: %s: %s" % (image, reason))


def give_up(image: str, reason: object) -> None:
    """Raises CommandError with the reason why a command can't go on without an image."""
    raise CommandError("%s: %s" % (image, reason))


def leave_out(choice: Choice, reason: object, fail: Callable[[str, Any], None]) -> None:
    """Call `fail` for an image that can't be taken; if it is a guess, only say so."""
    (complain_of if choice.is_guess else fail)(choice.image, choice.note(reason))


def iter_chosen(options: argparse.Namespace, find: Callable[[str], Sequence[Tuple[Any, ...]]],
                fail: Callable[[str, Any], None],
                choices: Optional[List[Choice]] = None) -> Iterator[Tuple[Choice, Any]]:
    """Yield each of the choices, or of all that are named, with each image that `find` knows for
    its text, once, without those that --exclude leaves out. An image is a tuple that begins with
    its repository here and its reference.

    Calls `fail` for what is not there. Raises CommandError if nothing is left: else verify would
    read all, and the others do nothing without a word."""
    seen: Set[str] = set()  # texts, for as values a:1@DIGEST and a:2@DIGEST are equal
    has_failed = False
    for choice in named_images(options) if choices is None else choices:
        images: Sequence[Tuple[Any, ...]] = ()
        try:
            images = find(choice.image)
        except RegistryError as error:  # whatever it is, the next image may fare better
            has_failed = has_failed or not choice.is_guess
            leave_out(choice, error, fail)
        is_written = options.images or options.file  # load without a choice takes all
        if len(images) > MANY and is_written and not options.quiet:  # to plan them takes a while
            complain("%s fits %d images" % (choice.image, len(images)))
        for image in images:
            label = image_text(*image[:2])
            if label not in seen and not fits_any(options.exclude, *image[:2]):
                seen.add(label)
                yield choice, image
    if not seen and not has_failed:
        raise CommandError("no image is left: all that were named are excluded, or not here")


def find_repositories(store: Reader, text: str, is_exact: bool = False) -> List[str]:
    """The repositories that fit a pattern, or the one that is called so here or at its origin.

    Unless `is_exact`, a pattern that fits none stands for names at docker.io: acme/* is what was
    pulled as acme/app."""
    if "*" not in text:
        with contextlib.suppress(Invalid):  # no repository can be called so; it may be a file
            return list(filter(store.has_repository, parse_local(text)[0]))[:1]
        return []
    # A repository's name has no colon, but its origin may have: lab.example:5000/**
    patterns = names_to_try(re.sub("^([^/:]*):([^/]*/)", r"\1_\2", text))
    for pattern in patterns[:1] if is_exact else patterns:
        names = list(filter(parse_glob(pattern).fullmatch, store.repositories()))
        if names:
            return names
    return []


def present_of(registry: Reader, names: List[str]) -> List[str]:
    """Those of some repositories that exist, or all if none does."""
    return list(filter(registry.has_repository, names)) or names


def has_image(store: Union[Archive, Directory], name: str, reference: Reference) -> bool:
    """Whether there is such an image, damaged or not."""
    is_digest = isinstance(reference, Digest)
    if isinstance(store, Archive):
        return store.holds(name, reference)
    path: Any = store.layout.revision_path if is_digest else store.layout.tag_path
    return os.path.isdir(path(name, reference))


def find_image(store: Union[Archive, Directory], text: str,
               is_exact: bool = False) -> Tuple[str, str]:
    """The repository and the reference of an image in the store, or in archives.

    The image is called by its name here, or by the one at its origin: team/app means
    docker.io/team/app if there is no repository team/app, and alpine:3.19 means
    docker.io/library/alpine:3.19 if alpine has no such tag. `is_exact` is for deletions: these
    look into the second repository only if the first one does not exist. Raises NAME_INVALID,
    MANIFEST_INVALID, DIGEST_INVALID, MANIFEST_UNKNOWN."""
    names, given = parse_local(text)
    reference = given or "latest"
    present = present_of(store, names)
    # Anyone may own team/app at docker.io, but library/alpine is Docker's.
    if is_exact or "/" in present[0]:
        del present[1:]
    for name in present:
        if has_image(store, name, reference):
            return name, reference
    others = ""
    with contextlib.suppress(Unknown):  # there is no such repository
        tags, more = take_page(store.tags(present[0]), 5)
        if tags:
            others = ", but as %s%s" % (", ".join(tags), " and more" if more else "")
    advice = "`tinyreg.py ls` shows what is, and `tinyreg.py pull` fetches more"
    if isinstance(store, Archive):
        advice = "`tinyreg.py ls ARCHIVE` shows what is"
    raise RegistryError("MANIFEST_UNKNOWN", message="not in %s as %s%s; %s" % (
        store.title, image_text(present[0], reference), others, advice))


def find_images(options: argparse.Namespace, store: Union[Archive, Directory], text: str,
                is_exact: bool = False, is_listing: bool = False) -> List[Tuple[str, str]]:
    """The repository and the reference of each image there that a text means: of one, as
    find_image() has it; with * of all that fit it, without a tag also of those that were pulled by
    their digest. For ls a name without a tag means all of a repository, also what has no tag.
    Raises CommandError if nothing fits."""
    is_whole = names_repository(text)
    if "*" not in text and not (is_whole and is_listing):
        return [find_image(store, text, is_exact)]
    names, _, pattern = (text, "", "*") if is_whole else text.rpartition(":")
    chosen, images = chosen_filter(options), []
    for name in find_repositories(store, names, is_exact):
        references = chosen.tags(name, store.tags(name), pattern)
        if is_whole and not chosen.narrows():
            references += (untagged(store, name) if is_listing else store.pinned(name)) or ()
        images += [(name, reference) for reference in references]
    if not images:
        raise CommandError("%s fits no image in %s; `tinyreg.py ls %s` shows what is there" % (
            text, store.title, "ARCHIVE" if isinstance(store, Archive) else "--tags"))
    return images


def iter_stored(options: argparse.Namespace, store: Union[Archive, Directory],
                fail: Callable[[str, Any], None] = give_up,
                choices: Optional[List[Choice]] = None,
                is_exact: bool = False) -> Iterator[Tuple[Choice, str, str]]:
    """Yield (a Choice of it alone, repository, reference) for each image there that is chosen, as
    iter_chosen does."""
    find = functools.partial(find_images, options, store, is_exact=is_exact)
    for choice, image in iter_chosen(options, find, fail, choices):
        label = image_text(*image) if "*" in choice.image else choice.image
        yield (choice._replace(image=label),) + image


def list_image(registry: Reader, name: str, reference: str) -> Dict[str, Any]:
    """What ls reports of an image: its description, its name and when it was pushed, or why it
    can't be read."""
    digest = reference if isinstance(reference, Digest) else None
    pushed = registry.pushed(name, reference)
    entry = {"repository": name, "tag": None if digest else reference,
             "pushed": timestamp(pushed) if pushed else None}
    try:
        return dict(describe(registry, name, digest or registry.resolve(name, reference)), **entry)
    except (Unknown, Invalid) as error:  # the row of the image says so
        return dict(entry, digest=digest, error=str(error))


def list_word(options: argparse.Namespace, store: Directory, text: str) -> Iterator[Any]:
    """Yield what ls reports of one word of the command line: of an image; or of all images of a
    repository, first of those that have a tag; or the digests of its blobs. Raises CommandError,
    NAME_INVALID, MANIFEST_INVALID, DIGEST_INVALID, MANIFEST_UNKNOWN."""
    names = find_repositories(store, text)
    if not names and names_repository(text):
        raise CommandError("there is no repository %s, and no such file; tinyreg.py ls lists "
                           "the repositories" % text)
    if options.digests:
        if not names_repository(text):
            raise CommandError("%s: --digests lists all blobs of a repository or archive" % text)
        yield from itertools.chain(*map(store.digests, names))
        return
    for name, reference in find_images(options, store, text, is_listing=True):
        tag = getattr(reference, "tag", None)  # of TAG@DIGEST; then the tag names it, if it may
        if tag and (tag, Digest(reference)) in iter_tags(store, name, tag.__eq__):
            reference = tag
        if not fits_any(options.exclude, name, reference):
            yield list_image(store, name, reference)


def list_archives(archive: Archive, store: Optional[Directory]) -> Iterator[Dict[str, Any]]:
    """Yield what ls reports of each image in archives. `lacking` is how many of their blobs are
    absent, `needs` the parts that have these; `left_out` is how many more are absent because the
    far side was known to have them, `in_store` how many of those the store has."""
    present, parts = set(archive.digests()), archive.parts
    for name, reference, digest in archive.images():
        entry = list_image(archive, name, reference)
        plan = Plan(archive, name, reference)
        try:
            report = plan.plan()
            absent = set(plan.blobs) - present
            lacking, left_out = absent - parts.left_out, absent & parts.left_out
            needed = set().union(*map(archive.needed_parts, lacking))
            in_store = [blob for blob in left_out
                        if store and os.path.exists(store.layout.blob_path(blob))]
            entry.update(lacking=len(lacking), left_out=len(left_out), in_store=len(in_store),
                         needs=sorted(parts.names[key][number - 1] for key, number in needed),
                         referrers=report.referrers,
                         files=list(files_in(archive, name, archive.manifest(name, digest))))
        except (Unknown, Invalid) as error:  # the row of the image says so
            entry["error"] = str(error)
        yield dict(entry, digest=digest)


def counted_kinds(referrers: Iterable[Mapping[str, str]]) -> str:
    """How many referrers of each type there are, in words."""
    counts = collections.Counter(referrer["type"] for referrer in referrers)
    return ", ".join("%d %s" % (count, kind) for kind, count in sorted(counts.items()))


def part_numbers(parts: Iterable[Part], archive: str) -> str:
    """The numbers of those parts that belong to one archive."""
    return ", ".join(str(part.number) for part in sorted(parts) if part.archive == archive)


def parts_in_words(numbers: str, names: Sequence[str]) -> str:
    """Which of the parts of an archive these are."""
    kind = "parts " if "," in numbers else "part " if numbers else "no part"
    return "%s%s of %d" % (kind, numbers, len(names))


def list_cells(entry: Dict[str, Any], is_alone: bool) -> List[str]:
    """The cells of an image's row in ls. `is_alone` is whether all rows are of one repository."""
    if is_alone:
        name = entry["tag"] or "-"
    elif entry["tag"]:
        name = image_text(entry["repository"], entry["tag"])
    else:
        name = "%s@%s" % (entry["repository"], shorten(entry["digest"]))
    pushed = entry["pushed"] or "-"
    if "error" in entry:
        return [name, "-", "-", pushed, entry["digest"] or "-", entry["error"]]
    platforms = ",".join(entry["platforms"]) or "-"
    if entry["missing"]:
        platforms += " (%d not here)" % entry["missing"]
    state = ""
    if entry.get("lacking"):
        state = "lacks " + counted(entry["lacking"], "blob")
        if entry["needs"]:
            state += " of " + ", ".join(entry["needs"])
    elif entry.get("left_out"):
        state = "complete with %s of the far side, of which this store has %d" % (
            counted(entry["left_out"], "blob"), entry["in_store"])
    elif "lacking" in entry:
        state = "complete"
    if entry.get("referrers"):
        state += "; " + counted_kinds(entry["referrers"])
    if entry.get("files"):
        state += "; files: " + ", ".join(entry["files"])
    return [name, in_units(entry["size"]), platforms, pushed, entry["digest"], state]


MAX_COLUMN = 80  # characters; the platforms of an image for ten take more


def table_lines(rows: List[List[str]]) -> List[str]:
    """The lines of a table; strangers' text may be in it."""
    rows = [[harmless(cell) for cell in row] for row in rows]
    # A longer cell moves the rest of its own row only.
    widths = [min(max(map(len, column)), MAX_COLUMN) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def list_rows(entries: List[Dict[str, Any]], is_alone: bool) -> List[str]:
    """The lines of a table of images."""
    rows = [["TAG" if is_alone else "IMAGE", "SIZE", "PLATFORMS", "PUSHED", "DIGEST", ""]]
    rows += [list_cells(entry, is_alone) for entry in entries]
    if not any(entry["pushed"] for entry in entries):  # archives don't tell
        for row in rows:
            del row[3]
    return table_lines(rows)


def parse_local_tag(text: str) -> Tuple[List[str], str]:
    """The repositories here that NAME:TAG may mean, the likeliest first, and the tag. Raises
    CommandError for what else may name an image; NAME_INVALID, MANIFEST_INVALID."""
    names, tag = parse_local(text) if text else ([], None)
    if tag is None or isinstance(tag, Digest):
        raise CommandError("'%s' is no tag; write NAME:TAG" % text)
    return names, tag


def show_history(options: argparse.Namespace) -> int:
    """Show what each of these tags points to, and has pointed to."""
    store, entries = open_store(options, renew=False), []
    if not options.images:
        raise CommandError("say of which tag: tinyreg.py ls --history NAME:TAG")
    rows = [["TAG", "PUSHED", "DIGEST", ""]]
    for text in options.images:
        parse_local_tag(text)
        name, tag = find_image(store, text)
        history = store.history(name, tag)
        for digest, moment in history:
            states = {"present": digest == history[0][0],
                      "gone": find_readable(store, name, digest) is None}
            entries.append(dict(states, repository=name, tag=tag, digest=digest,
                                pushed=timestamp(moment)))
            rows.append([image_text(name, tag), timestamp(moment), digest,
                         ", ".join(filter(states.get, states))])
    show(options, entries, table_lines(rows))
    return 0


def is_archive(text: str) -> bool:
    """Whether a word on the command line may name an archive; - is stdin."""
    return text == "-" or os.path.exists(text)


def list_store(options: argparse.Namespace) -> int:
    """List the repositories of the store; or, of repositories, images and archives that are named,
    the images. With --digests, list blobs instead, with --history what tags have pointed to. A word
    that names both a repository and a file means the repository."""
    if options.history:
        return show_history(options)
    words = paths = options.images
    store: Optional[Directory] = None
    items: List[Any] = []
    parts: List[str] = []
    try:
        store = open_store(options, renew=False)
        if options.tags and not words:
            words = list(store.repositories())
        paths = [word for word in words if is_archive(word) and not find_repositories(store, word)]
    except CommandError:  # there is no store; archives can be listed without
        if not words or not all(map(is_archive, words)):
            raise
    if store and not words:
        items += store.digests() if options.digests else store.repositories()
    for word in words:
        if store and word not in paths:
            items += list_word(options, store, word)
    if paths:
        archive = Archive(paths, tempfile.gettempdir())
        items += archive.digests() if options.digests else list_archives(archive, store)
        parts = [parts_in_words(part_numbers(archive.parts.given, key), names)
                 for key, names in archive.parts.names.items()
                 if names]  # a difference of one file has none
    lines = items
    if store and not words and not items:
        complain("%s holds no images" % store.root)
    if words and not options.digests:
        is_alone = (not paths and len(options.images) == 1 and names_repository(words[0])
                    and "*" not in words[0])
        lines = list_rows(items, is_alone) + parts
    show(options, items, lines)
    return 0


def default_root() -> str:
    """The directory of the store, if --root does not name another one."""
    return os.environ.get("TINYREG_ROOT") or "./registry"


def command_text(*words: str) -> str:
    """A command line of ours, for people to copy."""
    return "  tinyreg.py " + " ".join(map(shlex.quote, words))


def waiting_lines(size: str, until: float, command: List[str]) -> List[str]:
    """Two lines on bytes that gc can't free yet: until when, and a command that does not wait.
    `size` says how many, and that they can't be freed."""
    return ["%s before %s, since clients may be at it; while nobody pushes, this does not wait:"
            % (size, local_time(until)), command_text(*command, "--grace", "0")]


def space_lines(options: argparse.Namespace, store: Directory, names: Iterable[str]) -> List[str]:
    """When the space of what was deleted in these repositories can be freed, and how."""
    sizes, ends = zip(*(freed_bytes(store, name, GRACE_HOURS * 3600) for name in names))
    if not sum(sizes):
        return ["no space comes back: what is left needs all of it"]
    command = ["gc", "--untagged"]
    if options.root != default_root():
        command += ["--root", options.root]
    size = "up to " + in_units(sum(sizes))
    if max(ends) <= time.time():
        return [size + " come back with:", command_text(*command)]
    return waiting_lines(size + " can't be freed", max(ends), command)


class Deletion(NamedTuple):
    """What rm deletes: the image as it was named, its repository, the digest, and the tag, or the
    digest if it is the manifest that goes."""

    image: str
    name: str
    digest: Digest
    reference: Reference


def pass_if_gone(store: Directory, listed: Iterable[str], image: str, reason: object) -> None:
    """Go on without a tag that a list pins to a digest, if it is gone: who runs rm -f on a plan of
    gc again means the rest of it. Raises CommandError for other images."""
    names, reference = parse_local(image)
    name, tag = present_of(store, names)[0], getattr(reference, "tag", None)
    if image not in listed or not tag or os.path.isdir(store.layout.tag_path(name, tag)):
        give_up(image, reason)
    complain_of(image, "is gone already")


def plan_deletions(options: argparse.Namespace,
                   store: Directory) -> Tuple[List[Deletion], List[str]]:
    """What goes of what the command line and -f name, each once, with a manifest every tag that
    points to it; and in words what stays, because a tag has moved. Raises CommandError."""
    choices = named_images(options)
    guesses = ["%s (%s)" % choice[:2] for choice in choices if choice.is_guess]
    if guesses:
        complain("tinyreg: left out, for they stand where no image has to be: "
                 + in_one_line(guesses))
    choices = [choice for choice in choices if not choice.is_guess]
    for image in (choice.image for choice in choices):
        if names_repository(image) and "*" not in image:
            raise CommandError("%s: say which tag (%s:TAG) or manifest (%s@DIGEST) to delete"
                               % (image, image, image))
    deletions: Dict[Tuple[str, str], Deletion] = {}
    moved = []
    fail = functools.partial(pass_if_gone, store, {choice.image for choice in choices
                                                   if choice.where})
    for (text, *_), name, reference in iter_stored(options, store, fail, choices, True):
        tag = getattr(reference, "tag", reference)
        try:
            digest = store.resolve(name, tag) if tag else Digest(reference)
        except Unknown as error:
            fail(text, error)
            continue
        if reference not in (tag, digest):
            moved.append("%s stays: the tag points to %s" % (text, digest))
            continue
        others = [] if tag else [other for other, present in iter_tags(store, name)
                                 if present == digest]
        for going in others + [tag or digest]:
            image = image_text(name, going) if going in others else text
            deletions.setdefault((name, going), Deletion(image, name, digest, going))
    is_all = any(set(choice.image.partition(":")[0]) <= set("*/") for choice in choices)
    # Who says --newest may mean that these stay, which is what gc --keep is for.
    is_doubtful = is_all or options.newest or len(deletions) > MANY
    if is_doubtful and not options.yes and not options.dry_run:
        raise CommandError("%s would go; look at them with --dry-run, and say --yes if all of them "
                           "are meant" % counted(len(deletions), "image"))
    return list(deletions.values()), moved


def deletion_lines(options: argparse.Namespace, store: Directory,
                   deletions: List[Deletion], size: int) -> Iterator[str]:
    """Yield what rm says without --json."""
    verb = "would delete" if options.dry_run else "deleted"
    for image, _, digest, _ in deletions:
        yield "%s %s%s" % (verb, image, "" if digest in image else ", which was " + digest)
    if options.dry_run:
        yield "%s; gc --untagged would then free up to %s more" % (
            counted(len(deletions), "image"), in_units(size))
    elif deletions:
        yield from space_lines(options, store, sorted({deletion.name for deletion in deletions}))


def remove(options: argparse.Namespace) -> int:
    """Delete tags and manifests; their bytes stay until gc. If one can't be deleted, those that
    were deleted before it are reported all the same."""
    store, size = open_store(options), 0
    deletions, moved = plan_deletions(options, store)
    for name in {deletion.name for deletion in deletions} if options.dry_run else ():
        going = {deletion.reference for deletion in deletions if deletion.name == name}
        size += freed_bytes(store, name, 0, going)[0] - freed_bytes(store, name, 0)[0]
    done: List[Deletion] = []
    try:
        for deletion in deletions:
            image, name, digest, reference = deletion
            with contextlib.suppress(Unknown):  # somebody else has just deleted it
                present = resolve_reference(store, name, reference)
                if present != digest:  # pushed again since it was planned
                    moved.append("%s stays: the tag points to %s" % (image, present))
                    continue
                if not options.dry_run:
                    delete_reference(store, name, reference)
            done.append(deletion)
    finally:
        report = {"deleted": [deletion.image for deletion in done],
                  "digests": [deletion.digest for deletion in done]}
        if options.dry_run:
            report.update(dryRun=True, size=size)
        show(options, report, () if options.quiet else deletion_lines(options, store, done, size))
    if moved:
        raise CommandError(in_one_line(moved))
    return 0


# passwd and clients

def ask_for_password(user: str, is_new: bool) -> Optional[str]:
    """A password from the terminal, a new one asked for twice; None if there is no terminal.
    Raises CommandError, EOFError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            password = getpass.getpass("password of %s: " % user)
            if password and is_new and getpass.getpass("once more: ") != password:
                raise CommandError("the two passwords differ; nothing was changed")
        except getpass.GetPassWarning:  # what it reads would be seen
            return None
    return password


def is_password(text: str, limit: int = MAX_PASSWORD) -> bool:
    """Whether a text can be a password. Raises UnicodeError for what can't be UTF-8."""
    return 0 < len(text.encode("utf-8")) <= limit and "\0" not in text


def read_password(user: str, from_stdin: bool, is_new: bool = True) -> str:
    """The password of a user from the terminal, or, without one, from a line of standard input.
    Raises CommandError, also for what can't be a user's name."""
    if not USER.fullmatch(user):
        raise CommandError("%r is no user name: no spaces and no colons, and not * or @ or # first"
                           % user)
    limit = MAX_PASSWORD if is_new else MAX_TOKEN  # other registries take tokens as passwords
    # Ctrl-C and the end of the input mean that there is none.
    with contextlib.suppress(EOFError, KeyboardInterrupt, UnicodeError):
        password = None if from_stdin else ask_for_password(user, is_new)
        if password is None:
            password = sys.stdin.buffer.readline().decode("utf-8").rstrip("\r\n")
        if is_password(password, limit):
            return password
    raise CommandError("a password has 1 to %d bytes of UTF-8; nothing was changed" % limit)


def read_users() -> List[Tuple[str, str]]:
    """(user, password) from the lines of standard input. Raises CommandError."""
    users = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        user, _, password = line.decode("utf-8", "replace").strip().partition(" ")
        password = password.strip()
        is_right = USER.fullmatch(user) and is_password(password) and "\ufffd" not in password
        if is_right:
            users.append((user, password))
        elif user:
            raise CommandError("line %d of the standard input is not USER PASSWORD, with a space "
                               "between them; nothing was changed" % number)
    return users


def replace_user(file: str, user: str, hashed: Optional[bytes]) -> None:
    """Set a user's hashed password, in a last line of an htpasswd file, or remove the user if it is
    None. All other lines stay as they are, to the byte. Raises OSError, CommandError."""
    path = os.path.realpath(file)
    start = user.encode() + b":"
    with alone(path + ".lock"):
        content = read_file(path, 64 << 20) or b""
        others = re.sub(b"(?m)^" + re.escape(start) + b".*\n?", b"", content)
        if not hashed and others == content:
            raise CommandError("there is no user %s in %s" % (user, file))
        if others and not others.endswith(b"\n"):
            others += b"\n"
        if hashed:
            others += start + hashed + b"\n"
        Files(os.path.dirname(path)).write(path, others, private=True)


def passwd(options: argparse.Namespace) -> int:
    """Set a user's password, or remove the user; or list the users."""
    if options.list:
        for user in sorted(parse_users(read_settings(options.users))):
            tell(user)
        return 0
    if options.stdin and options.user is None and not options.delete:
        users = read_users()
    else:
        if not options.user:
            raise CommandError("no user name: write tinyreg.py passwd NAME --users FILE")
        password = "" if options.delete else read_password(options.user, options.stdin)
        users = [(options.user, password)]
    for user, password in users:
        replace_user(options.users, user, new_hash(password).encode() if password else None)
        if not options.quiet:
            done = "set the password of" if password else "removed"
            tell("%s %s in %s" % (done, user, options.users))
    return 0


def clients_ca(options: argparse.Namespace) -> str:
    """The CA's certificate as clients want it, and nothing else that is in its file; "" if their
    system knows it. Raises CommandError."""
    if options.server_ca == "system":
        return ""
    path = options.server_ca or os.path.join(tls_folder(options.root), "ca.crt")
    certificates = re.findall(
        "-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\\s]+-----END CERTIFICATE-----\n?",
        (read_file(path) or b"").decode("ascii", "replace"))
    if not certificates:
        raise CommandError(
            "there is no CA certificate in %s: `clients` belongs onto the server, and what it "
            "prints onto the clients; there, start tinyreg.py serve --tls first, or say "
            "--root DIR, or --server-ca FILE (system, if clients trust the certificate already), "
            "or --plain-http if the registry has no TLS" % path)
    return "".join(certificates)


def check_tls_name(root: str, host: str) -> None:
    """Raises CommandError if serve --tls has made the certificate, and it is not valid for
    HOST[:PORT]."""
    content = read_file(os.path.join(tls_folder(root), "server.pem")) or b""
    # It begins with the settings that it was made by, and these have subjectAltName = ...
    names = re.findall("(?:dns|ip):([^,\\s]+)", content.decode("ascii", "replace").lower())
    name = str(find_address(host) or without_port(host).lower())
    if names and name not in names and "*." + name.partition(".")[2] not in names:
        raise CommandError(
            "the registry's certificate is not valid for %s, so clients would refuse it: add "
            "--tls-name %s to tinyreg.py serve and start it again, or name it with --host as one "
            "of %s" % (name, name, ", ".join(names)))


def origins_in(root: str) -> List[str]:
    """The registries that the images in the store come from. Raises CommandError."""
    try:
        return known_origins(Directory(root, create=False))
    except OSError:
        raise CommandError(
            "there is no store in %s: `clients` belongs onto the server, for a mirror is told "
            "which registries the images in the store are from; there, say --root DIR" % root)


def mirror_login(options: argparse.Namespace) -> str:
    """The Authorization header for --user, whose password comes from standard input; "" without.
    Raises CommandError."""
    if not options.user:
        return ""
    if not options.mirror or options.client not in ("docker", "containerd"):
        raise CommandError("--user is for clients docker --mirror and clients containerd --mirror; "
                           "podman sends a mirror what podman login has stored")
    return basic_authorization(options.user,
                               read_password(options.user, not sys.stdin.isatty()))


def check_clients_options(options: argparse.Namespace) -> None:
    """Raises CommandError for options that don't go together."""
    if options.install and not options.client:
        raise CommandError("say for which client: tinyreg.py clients CLIENT --install")
    if options.known_origins and not options.mirror:
        raise CommandError("--known-origins goes with --mirror")
    has_no_ca = options.plain_http or options.server_ca == "system"
    if options.client == "system" and (has_no_ca or options.mirror):
        raise CommandError("clients system is for the CA of a registry with TLS, and no more: "
                           "leave out --plain-http, --mirror and --server-ca system")


def clients(options: argparse.Namespace) -> int:
    """Print (or, with --install, run) scripts that make clients trust this registry, or use it as
    a mirror."""
    host = options.host or socket.gethostname() + ":5000"
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", host):
        raise CommandError("--host %s is not HOST:PORT" % host)
    check_clients_options(options)
    ca = None if options.plain_http else clients_ca(options)
    if ca and not options.server_ca:
        check_tls_name(options.root, host)
    origins = origins_in(options.root) if options.mirror else ()
    setup = ClientSetup(host, ca, origins, options.known_origins, mirror_login(options))
    script = "".join(client_script(client, setup) for client in CLIENTS
                     if options.client in (None, client))
    if not options.install:
        for line in script.splitlines():
            tell(line)
        return 0
    output = subprocess.DEVNULL if options.quiet else None
    if subprocess.run(["sh", "-c", script], stdout=output).returncode:
        raise CommandError("the script for %s failed, and says above why" % options.client)
    return 0


# Images between registries: what pull, push, save and load have in common


class Progress:
    """Shows how far a transfer is: on a terminal, in a line that is drawn again and again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.is_quiet = options.quiet
        self.is_moving = sys.stderr.isatty() and not self.is_quiet
        self.reports: List[Report] = []  # of all images that are copied
        self.next_time = 0.0  # of the monotonic clock; until then the line is not drawn again

    def show(self, line: str) -> None:
        """Show a line in place of the one that moves; "" only removes that."""
        if self.is_moving:
            tell_progress(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if not self.is_quiet:
            self.show("")
            complain(line)

    def is_due(self) -> bool:
        """Whether to draw the line: on a terminal, and about ten times a second."""
        is_due = self.is_moving and time.monotonic() >= self.next_time
        if is_due:
            self.next_time = time.monotonic() + 0.1
        return is_due

    def count(self, blobs: int, size: int) -> None:
        """Show how much was read. Verification calls this, in any thread."""
        if self.is_due():
            self.show("%s, %s read" % (counted(blobs, "blob"), in_units(size)))

    def watch(self, report: Report) -> None:
        """Show how far an image is. Report calls this, in any thread."""
        if not self.is_due():
            return
        share = report.moved_bytes() / max(report.total_bytes, 1)
        bar = ("#" * int(share * 20)).ljust(20, "-")
        self.show("%s [%s] %d %%, in total %s of %s" % (
            report.image, bar, share * 100,
            in_units(sum(report.moved_bytes() for report in self.reports)),
            in_units(sum(report.total_bytes for report in self.reports))))


def summary(report: Report, is_planned: bool) -> str:
    """One line on what became of an image, or what will."""
    action, blobs, size = "copied", report.copied_blobs, report.copied_bytes
    if is_planned:
        action, blobs, size = "to copy:", report.needed_blobs, report.needed_bytes
    present = report.total_blobs - blobs - len(report.missing)
    where = " (%s)" % report.where if report.where and is_planned else ""
    line = "%s%s: %s, %s %s in %s, %d there already" % (
        report.image, where, report.digest, action, in_units(size), counted(blobs, "blob"), present)
    if report.absent:
        line += ", %s of the index left out" % counted(len(report.absent), "manifest")
    for old, new in report.stripped.items():
        line += ", --strip put %s in the place of %s" % (new, old)
    return line + "; referrers: " + (counted_kinds(report.referrers) or "none found")


def what_is_lacking(report: Report) -> str:
    """Which blobs the source lacks, or has damaged, in words; "" if there are none."""
    texts = ["%s in the source: %s" % (state, " ".join(digests)) for state, digests
             in (("missing", report.missing), ("damaged", report.damaged)) if digests]
    return "; ".join(["no tag was set"] + texts) if texts else ""


def lacking_digests(reports: Iterable[Report]) -> Set[Digest]:
    """The digests of the blobs that images need and that their source lacks, or has damaged."""
    return {digest for report in reports for digest in report.missing + report.damaged}


def is_in_parts(copy: Copy) -> bool:
    """Whether all that a copy lacks is in other parts of a split archive. load says once for all
    images which parts these are."""
    source = copy.source
    return isinstance(source, Archive) and all(map(source.needed_parts,
                                                   lacking_digests([copy.report])))


def leave_at_once(number: int, frame: Any) -> None:
    """End on Ctrl-C as by kill -9: what was copied stays. An orderly end would take a minute, for
    threads wait for the network until they time out."""
    os.write(2, b"\ntinyreg: interrupted; run it again, and it goes on from here\n")
    os._exit(130)


def copy_choices(options: argparse.Namespace, source: Registry) -> Dict[str, Any]:
    """What the options of a command say of its copies, for Copy."""
    keys: List[PublicKey] = sum(options.signed_by, [])
    return {"platforms": options.platform, "referrers": not options.no_referrers,
            "strip": options.strip, "check": Signed(source, keys).check if keys else do_nothing}


def complain_of_plan(report: Report) -> None:
    """Say so if the source has another digest for the tag of TAG@DIGEST, and what stays behind
    because it is not signed."""
    for text in report.unsigned:
        complain_of(report.image, text + " is left out: no key of --signed-by has signed it, and "
                    "it can run")
    for tag, digest in report.moved.items():
        complain_of(report.image, "the tag %s has moved to %s; the digest was taken, and gets the "
                    "tag here" % (tag, digest))


class Destination(NamedTuple):
    """Where --to leads, or --via: a registry, and what the names of its repositories begin with."""

    host: str
    prefix: str  # ends in a slash, or is ""

    def __str__(self) -> str:
        return (self.host + "/" + self.prefix).rstrip("/")

    def name_for(self, name: str) -> str:
        """What a repository of the store is called there. What once came from that registry goes
        back to its own name, unless there is a prefix."""
        own = () if self.prefix else [(origin_of(self.host), "")]
        return self.prefix + renamed(name, own)


def parse_destination(text: str) -> Destination:
    """HOST[:PORT][/PREFIX]. Raises CommandError."""
    host, _, prefix = text.rstrip("/").partition("/")
    if not HOST.fullmatch(host) or prefix and not NAME.fullmatch(prefix):
        raise CommandError("%r is no registry; write HOST[:PORT] or HOST[:PORT]/PREFIX" % text)
    return Destination(host, prefix + "/" if prefix else "")


class Transfer:
    """Copies several images to one target, after it has planned all of them. Several are planned
    at once and copied at once; what is said about them comes in the order in which they were added.

    An image that fails does not stop the others. Once there is a Transfer, Ctrl-C ends the program
    at once."""

    def __init__(self, options: argparse.Namespace, target: Registry) -> None:
        self.options, self.target = options, target
        self.progress = Progress(options)
        self.traffic = Traffic(options.jobs, options.rate)
        self.stored_names: Dict[Tuple[str, str], str] = {}  # by the names that they get, and tags
        self.copies: List[Copy] = []
        self.failures: List[Dict[str, str]] = []
        self.told = 0  # how many of the failures were said at once
        self.files: List[Dict[str, Optional[str]]] = []  # where it comes from, and what is wrong
        self.holds: Set[Digest] = set()  # the blobs of the images that have arrived
        self.refused: Set[Tuple[str, str]] = set()  # (name, fallback_tag()) of such images
        self.needed: Dict[Digest, int] = {}  # how many bytes of each blob the target lacks
        self.free_memory = MAX_PLANS  # bytes; a plan for which there is none is made again
        self.mutex = threading.Lock()  # of the free memory
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, leave_at_once)

    def fail(self, image: str, reason: object, quietly: bool = False) -> None:
        """Note why an image is not copied; say it on stderr, unless `quietly`."""
        self.failures.append({"image": image, "error": str(reason)})
        self.progress.show("")
        if not quietly:
            self.told += 1
            complain_of(image, reason)

    def add(self, choice: Choice, source: Registry, name: str, reference: str,
            stored_name: str = "") -> Report:
        """Name one image that is to be copied; `stored_name` is its name here, if the source has
        another one. Raises NAME_INVALID; CommandError if another one would get the same name."""
        stored_name = stored_name or name
        target_name = renamed(stored_name, self.options.rename)
        if self.options.to:
            target_name = self.options.to.name_for(target_name)
        tag = getattr(reference, "tag", reference)
        other = self.stored_names.setdefault((target_name, tag), stored_name)
        if tag and other != stored_name:
            raise CommandError("%s and %s would both become %s; copy one of them, or give them "
                               "different names with --rename"
                               % (other, stored_name, image_text(target_name, tag)))
        report = Report(choice, self.progress.watch, image_text(stored_name, reference))
        self.copies.append(Copy(source, self.target, name, reference, target_name, self.traffic,
                                report=report, **copy_choices(self.options, source)))
        return report

    def run(self) -> int:
        """Copy what was added, unless it is a dry run, and report. Returns the exit status. Raises
        CommandError if the target has no room."""
        count, names = len(self.copies) + len(self.failures), sorted(self.stored_names.values())
        for old, new in self.options.rename if names else ():
            if not any(begins_with(name, old) for name in names):
                complain("tinyreg: --rename %s=%s: no name begins so; the first is %s"
                         % (old, new, names[0]))
        with self.traffic.pool, concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            # A signature stays with its image, also if it was named by itself.
            self.copies = [copy for copy in list(self._iter_done(pool, self._plan))
                           if (copy.name, copy.reference.partition(".")[0]) not in self.refused]
            self.progress.reports = reports = [copy.report for copy in self.copies]
            for report in reports:
                complain_of_plan(report)
            needed, free = sum(self.needed.values()), self.target.free_space()
            if free is not None and needed > free and not self.options.dry_run:
                raise CommandError("%s are needed, and %s are free; make room, or copy less "
                                   "(--platform, --no-referrers)"
                                   % (in_units(needed), in_units(free)))
            if len(reports) > MANY:
                self.progress.say("%s: %s to copy" % (counted(len(reports), "image"),
                                                      in_units(needed)))
            for copy in self._iter_done(pool, self._copy):
                self._tell(copy)
        show(self.options, {
            "images": [report.as_json() for report in reports], "failed": self.failures,
            "needed_bytes": needed, "files": self.files, "finished": timestamp(),
            "store": str(self.options.to or self.options.root),
            "missing": sorted(lacking_digests(reports)), "holds": sorted(self.holds),
        }, self._iter_lines(needed, free))
        lock = self.options.lock
        pins = {report.pin: report.digest for report in reports if report.complete}
        if pins:
            write_lock(lock, pins)
        if self.told and count > 1 and not self.options.json:
            note = ", and are not in " + lock if lock else ""
            complain("tinyreg: %d of %d images failed%s; it is said above why"
                     % (self.told, count, note))
        return 1 if self.failures else 0

    def _iter_done(self, pool: concurrent.futures.ThreadPoolExecutor,
                   action: Callable[[Copy], None]) -> Iterator[Copy]:
        """Yield the copies for which the action succeeds, and note why others fail."""
        def attempt(copy: Copy) -> Optional[str]:
            try:
                action(copy)
            except (RegistryError, OSError) as error:  # the next image may fare better
                copy.clear()
                return error_text(error)
            return None

        for copy, reason in zip(self.copies, pool.map(attempt, self.copies)):
            if reason is None:
                yield copy
            else:
                leave_out(copy.report.choice, reason, self.fail)

    def _plan(self, copy: Copy) -> None:
        try:
            copy.plan()
        except Refused:
            self.refused.update((copy.name, fallback_tag(digest)) for digest in copy.going)
            raise
        self.needed.update(copy.measure())
        with self.mutex:
            self.free_memory -= MAX_MANIFESTS - copy.free_memory
        if self.free_memory < 0:
            copy.clear()

    def _copy(self, copy: Copy) -> None:
        if not self.options.dry_run:
            if not copy.manifests:
                copy.plan()
            copy.run()
            if copy.report.complete:
                copy.report.arrived = timestamp()
                self.holds.update(copy.blobs)
            copy.clear()

    def _tell(self, copy: Copy) -> None:
        """Say what became of an image."""
        self.progress.show("")
        lacking = what_is_lacking(copy.report)
        if lacking:
            self.fail(copy.report.image, lacking, quietly=is_in_parts(copy))
        elif not self.options.quiet and not self.options.json:
            tell(summary(copy.report, self.options.dry_run))
            flush_output()  # who reads it from a pipe sees that the transfer goes on

    def _iter_lines(self, needed: int, free: Optional[int]) -> Iterator[str]:
        """Yield what is said at the end, without --json."""
        if self.options.dry_run:
            room = "" if free is None else "; %s free" % in_units(free)
            blobs = counted(len(self.needed), "blob")
            yield "in total: %s, %s to copy%s" % (blobs, in_units(needed), room)
        elif self.copies and isinstance(self.target, Directory) and not self.options.quiet:
            yield "the store is " + self.target.root


def open_remote(options: argparse.Namespace, host: str, keeps_lists: bool = False) -> Remote:
    """The registry at a host, with CONNECTION_OPTIONS. Raises CommandError for a wrong --ca."""
    try:
        return Remote(host, options.ca, options.insecure, options.plain_http, options.retries,
                      say=Progress(options).say, keeps_lists=keeps_lists)
    except OSError as error:
        raise CommandError("can't use %s as the CA: %s"
                           % (options.ca, error.strerror or error))


def find_remote(options: argparse.Namespace, open_host: Callable[[str], Remote],
                text: str) -> List[Image]:
    """The images of another registry that a text means: one, or all whose tag fits a pattern; with
    the host and the path from which they are fetched. Raises RegistryError, also if no tag fits."""
    before, _, pattern = text.rpartition(":")
    is_pattern = "*" in pattern and "/" not in pattern  # else what precedes it is a host
    image = parse_image(before if is_pattern else text)
    if options.via and image.host == "docker.io":
        image = image._replace(host=options.via.host, path=options.via.prefix + image.path)
    if not is_pattern:
        return [image]
    tags = chosen_filter(options).tags(
        image.stored_name, filter(TAG.fullmatch, open_host(image.host).tags(image.path)), pattern)
    if not tags:
        raise RegistryError("MANIFEST_UNKNOWN", message="no tag fits")
    if len(tags) > MOST:
        raise RegistryError("UNSUPPORTED", message="%d tags fit, and %d are the most that are "
                            "taken; write a narrower pattern, or choose with --newest N or "
                            "--versions RANGE" % (len(tags), MOST))
    return [image._replace(reference=tag) for tag in tags]


def pull(options: argparse.Namespace) -> int:
    """Copy images from their registries into the store."""
    options.strip, options.to = False, None  # the store takes an index without its children
    transfer = Transfer(options, open_store(options, create=True))
    open_host = functools.lru_cache(None)(functools.partial(open_remote, options, keeps_lists=True))
    find = functools.partial(find_remote, options, open_host)
    for choice, image in iter_chosen(options, find, transfer.fail):
        text = image_text(name_at_origin(image.stored_name), image.reference)
        transfer.add(choice._replace(image=text), open_host(image.host), image.path,
                     image.reference, image.stored_name)
    return transfer.run()


def push(options: argparse.Namespace) -> int:
    """Copy images from the store to another registry."""
    store = open_store(options)
    transfer = Transfer(options, open_remote(options, options.to.host))
    for choice, *image in iter_stored(options, store, transfer.fail):
        transfer.add(choice, store, *image)
    return transfer.run()


def set_tag(options: argparse.Namespace) -> int:
    """Give an image of the store one more tag; or let a tag point to what it pointed to before.

    Into another repository the signatures go along. In the same one they are already."""
    text = options.image if options.undo else options.tag
    if bool(options.tag) == options.undo:
        raise CommandError("write: tag IMAGE NAME:TAG, or: tag --undo NAME:TAG")
    names, tag = parse_local_tag(text)
    store = open_store(options)
    target = present_of(store, names)[0]
    image = image_text(target, tag)
    name, reference = find_image(store, options.image, is_exact=options.undo)
    history: List[Digest] = []
    with contextlib.suppress(Unknown):  # the tag is new
        history = [digest for digest, _ in store.history(target, tag)]
    if options.undo:
        if not history[1:]:
            raise CommandError("%s has never pointed to anything else" % image)
        reference = history[1]
        if not find_readable(store, name, reference):
            raise CommandError("%s pointed to %s before, and that is gone; `tinyreg.py ls "
                               "--history %s` shows what is not" % (image, reference, text))
    digest = TaggedDigest(resolve_reference(store, name, reference), tag)
    report = copy(store, store, name, digest, target, referrers=name != target)
    if not report.complete:
        raise CommandError("%s: %s" % (text, what_is_lacking(report)))
    if not options.quiet:
        was = ", and was " + history[0] if history and history[0] != report.digest else ""
        tell("%s is %s%s" % (image, report.digest, was))
    return 0


def report_collection(options: argparse.Namespace, collection: Collection,
                      removed: List[Dict[str, Any]]) -> None:
    """Print what a run of gc has deleted, or would delete, and what has to wait."""
    waiting, until = (0, 0.0) if options.quiet else collection.waiting_bytes()
    counts = collection.counts
    if collection.doubt:
        complain("tinyreg: " + collection.doubt)
    kinds = ["manifest", "link", "blob", "upload", "repository"]
    if counts["tag"]:
        kinds.insert(0, "tag")
    lines = ["%s %s; %s" % ("would remove" if options.dry_run else "removed",
                            ", ".join(counted(counts[kind], kind) for kind in kinds),
                            in_units(counts["bytes"]))]
    if waiting:
        size = in_units(waiting) + " more can't be freed"
        lines += waiting_lines(size, until, options.arguments)
    show(options, {"dryRun": options.dry_run, "size": counts["bytes"], "removed": removed,
                   "waiting": waiting, "waitingUntil": timestamp(until) if waiting else None,
                   "unreadable": collection.unread}, [] if options.quiet else lines)
    if collection.unread:
        complain("tinyreg: kept all that may belong to what can't be read (see tinyreg.py verify): "
                 + in_one_line(collection.unread))


def read_lists(store: Directory, paths: Sequence[str],
               force: bool) -> Optional[Callable[[str, str, Digest], bool]]:
    """A function that tells whether one of some lists names a tag; None if there is no list. Raises
    CommandError, also for a list that names no tag here, unless `force`; OSError."""
    origins = {name.partition("/")[0] for name in store.repositories()} if paths else set()
    lists = [tags_listed(path, origins) for path in paths]
    for path, is_listed in () if force else zip(paths, lists):
        if not any(is_listed(*tag) for tag in all_tags(store)):
            raise CommandError("no tag here is named in %s, so all would go that no other list "
                               "names; if that is meant, say --force" % path)
    return (lambda *tag: any(is_listed(*tag) for is_listed in lists)) if lists else None


def collect(options: argparse.Namespace) -> int:
    """Delete what nothing refers to; or say what that would be."""
    store = open_store(options)
    expiry = Expiry(options.keep, options.older_than, options.repositories,
                    read_lists(store, options.only, options.force))
    if (options.repositories or options.plan) and not expiry.is_on:
        raise CommandError("--repositories and --plan are about the tags that --keep, --older-than "
                           "or --only delete; add one of these")
    options.dry_run = options.dry_run or bool(options.plan)
    removed: List[Dict[str, Any]] = []
    planned: Dict[str, Optional[Digest]] = {}

    def note(kind: str, name: str, size: int) -> None:
        if kind == "tag" and options.plan:
            with contextlib.suppress(Unknown):  # somebody has just deleted it
                planned[name] = store.resolve(*name.rsplit(":", 1))
        if options.json:
            removed.append({"kind": kind, "name": name, "size": size})
        elif options.dry_run:
            bytes_text = "  " + counted(size, "byte") if size else ""
            tell("%s  %s%s" % (kind, name, bytes_text))

    try:
        collection = collect_garbage(store, grace=options.grace, untagged=options.untagged,
                                     dry_run=options.dry_run, tell=note, expiry=expiry,
                                     force=options.force)
    except BlockingIOError:
        raise CommandError("another gc is at work in %s; it does the same" % store.root)
    write_lock(options.plan, planned)
    report_collection(options, collection, removed)
    return 0


def read_blobs(check: Verification, path: str,
               blobs: Mapping[Digest, Union[Member, JoinedBlob]]) -> None:
    """Read all blobs of an archive."""
    # Links give one file many names; it is read once.
    read = functools.lru_cache(maxsize=None)(read_digest)
    for digest, member in blobs.items():
        try:
            is_intact = read(member, digest.algorithm) == digest
        except OSError:  # a medium that can't be read is damaged as well
            is_intact = False
        if not is_intact:
            check.add_damage(digest, path)
        check.count(member.length, 1)


def look_for_needed(check: Verification, archive: Archive, name: str,
                    reference: Union[str, Digest]) -> None:
    """Add what an image in an archive lacks. What was left out on purpose (save --have) is no
    damage."""
    image, parts, plan = image_text(name, reference), archive.parts, Plan(archive, name, reference)
    try:
        plan.plan()
    except (Unknown, Invalid) as error:  # the plan has got as far as it could
        check.add(Finding("unreadable image", str(error), archive.root), image)
    for digest in plan.blobs:
        for piece in check.damaged.keys() & {digest}.union(parts.ranges.get(digest, ())):
            check.add(check.damaged[piece], image)
    absent = set(plan.blobs).difference(archive.blobs, archive.joined)
    check.left_out |= absent & parts.left_out
    for digest in absent - parts.left_out:
        needed = archive.needed_parts(digest) - parts.given
        lacks = [("part %d of %d was not given" % (number, len(parts.names[key])),
                  parts.names[key][number - 1]) for key, number in needed]
        for problem in lacks or [("missing blob", digest)]:
            check.add(Finding(*problem, archive.root), image)


def verify_archive(check: Verification, archive: Archive, paths: Sequence[str]) -> None:
    """Read every blob in each of the files of an archive, and look for all that its images need.
    Raises OSError."""
    for path, problem in archive.unreadable.items():
        check.add(Finding("unreadable archive", problem, path))
    for path in paths:
        # What can't be opened by itself is among the unreadable ones.
        with contextlib.suppress(Unsupported):
            read_blobs(check, path, Archive([path], partly=True).blobs)
    # Whether whole parts belong to one blob shows only where all of them are at hand.
    read_blobs(check, archive.root, {
        digest: blob for digest, blob in archive.joined.items()
        if check.damaged.keys().isdisjoint(archive.parts.ranges[digest])})
    for name, reference, _ in archive.images():
        look_for_needed(check, archive, name, reference)


def verdict_on(check: Verification) -> str:
    """What to do about the findings, in a sentence."""
    verdict = "all is well"
    if check.findings:
        verdict = ("%d damaged or missing; push the images that it harms (or copy the archive) "
                   "again" % len(check.findings))
        if all(finding.what.startswith("part ") for finding in check.findings):
            verdict = "what was given is well; give all parts to know about the rest"
    if check.unsigned:
        verdict = verdict.replace("all is well", "nothing is damaged")
        verdict += "; %s not signed" % counted(len(check.unsigned), "image")
    if check.left_out:
        verdict += "; %s left out: on the far side already" % counted(len(check.left_out), "blob")
    return verdict


def report_verification(options: argparse.Namespace, check: Verification) -> None:
    """Print what was read, what is wrong, and what that harms."""
    damage: List[Dict[str, Any]] = [dict(finding._asdict(), harms=sorted(images))
                                    for finding, images in sorted(check.findings.items())]
    lines = []
    for entry in damage:
        lines.append("%(what)s: %(name)s (%(path)s)" % entry)
        lines += ["    harms " + image for image in entry["harms"]]
    would = "would be " if options.dry_run and options.repair else ""
    moved = check.moved if not would else [
        entry["path"] for entry in damage if entry["what"] != "missing blob"]
    lines += ["%sput aside: %s" % (would, path) for path in moved]
    lines += ["not signed by a key of --signed-by: " + image for image in check.unsigned]
    if not options.quiet:
        if check.leftovers:
            lines.append("%s to blobs that are gone and that no image needs: %s" % (
                counted(len(check.leftovers), "link"),
                would + "removed" if options.repair else "no harm; --repair removes that"))
        lines.append("%s, %s: %s" % (counted(check.blobs, "blob"), in_units(check.bytes),
                                     verdict_on(check)))
    show(options, {"blobs": check.blobs, "size": check.bytes, "damage": damage,
                   "left_out": len(check.left_out), "moved": moved, "unsigned": check.unsigned,
                   "leftovers": len(check.leftovers)}, lines)


def iter_unsigned(registry: Registry, keys: Iterable[PublicKey],
                  images: Sequence[Tuple[str, str]]) -> Iterator[str]:
    """Yield those of some images, or of all with and without a tag, that none of the keys has
    signed; and what is about them, can run, and is not signed either."""
    check = Signed(registry, keys).check
    images = images or [
        (name, reference) for name in registry.repositories() for reference
        in itertools.chain(registry.tags(name), untagged(registry, name) or ())]
    for name, reference in images:
        plan = Plan(registry, name, reference, check=check)
        try:
            plan.plan()
        except Refused:
            yield image_text(name, reference)
        except Invalid as error:
            yield "%s (%s)" % (image_text(name, reference), error)
        except Unknown:
            pass  # a damaged tag; it is among the findings
        yield from plan.report.unsigned


def verify(options: argparse.Namespace) -> int:
    """Read everything, or some images, again; name what is damaged, and what that harms. The exit
    status is 1 if anything is."""
    archives = list(filter(is_archive, options.images))
    has_images = len(archives) < len(options.images) or bool(options.file)
    if archives and (has_images or options.repair or options.rate):
        raise CommandError("--repair, --rate and images go with the store, not with archives")
    logger.setLevel(logging.ERROR)  # what it would warn of is in the report
    progress = Progress(options)
    signal.signal(signal.SIGINT, leave_at_once)  # threads would go on reading
    registry: Registry
    images: List[Tuple[str, str]] = []
    if archives:
        registry = Archive(archives, partly=True)
        check = Verification(progress.count)
        verify_archive(check, registry, archives)
    else:
        registry = store = open_store(options)
        if has_images:
            images = [image[1:] for image in iter_stored(
                options, store, lambda image, why: give_up(image, "no such file, and %s" % why))]
        check = StoreVerification(store, progress.count, options.rate,
                                  options.repair and not options.dry_run, images)
        check.run()
    if options.signed_by:
        check.unsigned = list(dict.fromkeys(
            iter_unsigned(registry, sum(options.signed_by, []), images)))
    progress.show("")
    report_verification(options, check)
    return 1 if check.findings or check.unsigned else 0


# Archives


def digests_in(path: str) -> Iterable[Digest]:
    """The digests that a file lists, as `ls --digests` prints them; those of the blobs that, as
    `load --json` says, a store holds; or those of an archive. Raises CommandError, OSError."""
    if not os.path.exists(path):
        raise CommandError("--have %s: there is no such file (images are named before --have)"
                           % path)
    try:
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                start = file.peek(100).lstrip(b" \r\n")
                if start.startswith(b"{"):
                    return parse_digests(load_json(file.read()).get("holds"))
                if re.match(rb'[\s\["\]]*(?:sha(?:256|512):|\Z)', start):
                    text = file.read().decode("ascii", "replace")
                    return map(Digest, re.findall(DIGEST.pattern, text))
        return Archive([path]).digests()
    except (RegistryError, ValueError) as error:  # whatever it is, the message has it
        raise CommandError("--have %s: it is neither what `tinyreg.py ls --digests` or `load "
                           "--json` printed, nor an archive: %s" % (path, error))


def add_to_archive(options: argparse.Namespace, store: Directory, writer: ArchiveWriter,
                   choice: Choice, name: str, reference: str) -> Report:
    """Copy one image of the store into what becomes an archive. Raises CommandError: an archive
    that lacks an image would only be noticed on the far side."""
    report = Report(choice, pin=image_text(name, reference))
    try:
        copy(store, writer, name, reference, report=report, **copy_choices(options, store))
    except RegistryError as error:  # whatever it is, the message names the image
        raise CommandError("%s: %s" % (choice.image, error))
    complain_of_plan(report)
    if report.missing:
        raise CommandError("%s: the store lacks %s; pull or push it again"
                           % (choice.image, ", ".join(report.missing)))
    return report


def write_archive(options: argparse.Namespace, writer: ArchiveWriter, size: int) -> List[str]:
    """Write what is planned, and show how far it is. Returns the sha256 of each file."""
    progress = Progress(options)
    report = Report(Choice(options.output), progress.watch)
    report.total_bytes = size
    progress.reports.append(report)
    try:
        return writer.save(lambda count: report.add(copied_bytes=count))
    finally:
        progress.show("")


def check_output(options: argparse.Namespace) -> None:
    """Raises CommandError if save can't write where -o says."""
    if options.output == "-" and (options.split or sys.stdout.isatty()):
        raise CommandError("parts, or a terminal, can't take an archive from stdout: name a file "
                           "with -o")
    if os.path.exists(options.output) and not os.path.isfile(options.output):
        raise CommandError("-o %s is no file that could be replaced; name one, or write -o - > %s"
                           % (options.output, options.output))
    if options.lock and os.path.realpath(options.lock) == os.path.realpath(options.output):
        raise CommandError("--lock %s would replace the archive" % options.lock)


def save(options: argparse.Namespace) -> int:
    """Write images of the store into an archive."""
    check_output(options)
    store = open_store(options)
    writer = ArchiveWriter(digest for paths in options.have for path in paths
                           for digest in digests_in(path))
    reports = [add_to_archive(options, store, writer, *image)
               for image in iter_stored(options, store)]
    writer.plan(options.output, None if options.no_self else read_file(__file__, -1),
                options.split)
    files: List[Dict[str, Any]] = [{"file": path, "size": writer.size(digests)}
                                   for path, digests in writer.files]
    needed = sum(file["size"] for file in files)
    pins = {report.pin: report.digest for report in reports}
    if options.output == "-" and not options.dry_run:
        writer.write(writer.files[0][1], sys.stdout.buffer.write)
        write_lock(options.lock, pins)
        return 0
    if not options.dry_run:
        folder = os.path.dirname(os.path.realpath(options.output))
        remove_parts(options.output)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CommandError("%s has room for %s, and %s are needed"
                               % (folder, in_units(free), in_units(needed)))
        for file, sha256 in zip(files, write_archive(options, writer, needed)):
            file["sha256"] = sha256
        write_lock(options.lock, pins)
    lines = ["%s: %s, %s in %s" % (options.output, counted(len(reports), "image"),
                                   in_units(needed), counted(len(writer.files), "file"))]
    form = "  %(file)s  %(size)d bytes"
    if options.dry_run:
        lines += table_lines([["  " + report.image, in_units(report.total_bytes),
                               str(report.digest), report.where] for report in reports])
    else:
        form += "  sha256:%(sha256)s"
    lines += [form % file for file in files]
    show(options, {"images": [report.as_json() for report in reports], "bytes": needed,
                   "files": files, "holds": sorted(writer.blobs)},
         [] if options.quiet else lines)
    return 0


def keep_ranges(store: Directory, archive: Archive) -> None:
    """Keep the ranges of blobs that are not whole yet until the other parts come. Forget the
    ranges that nobody needs any more, and those that are damaged. Raises OSError."""
    needed = set().union(*[ranges for blob, ranges in archive.parts.ranges.items()
                           if not os.path.exists(store.layout.blob_path(blob))])
    for digest in needed.union(*archive.parts.ranges.values()):
        path = os.path.join(store.layout.own, "ranges", digest.encoded)
        if digest not in needed or archive.damaged.get(digest) == path:
            with contextlib.suppress(FileNotFoundError):  # it was never kept
                store.files.remove(path)
        elif (digest in archive.blobs and not os.path.exists(path)
              and not archive.find_damage(digest)):
            member = archive.blobs[digest]
            with member.open() as blob:
                store.files.fill(path, functools.partial(copy_bytes, blob, member.length))


def iter_problems(options: argparse.Namespace, archive: Archive,
                  reports: List[Report]) -> Iterator[str]:
    """Yield what is wrong with archives, and what to do: a line for each file that is damaged, and
    for each split archive of which more parts are needed."""
    lacking = lacking_digests(reports)
    for entry in sorted(archive.unreadable.items()):
        yield "%s: %s" % entry
    for path in sorted(set(archive.damaged.values())):
        yield "%s is damaged: copy it again; what is intact in it was taken" % path
    if lacking & archive.parts.left_out:
        yield ("what --have said is here was left out on purpose, and is not here: save again "
               "with --have of what `ls --digests` says now")
    if options.dry_run:
        return
    advice = " (load all at once: another registry keeps no pieces of a blob)" if options.to else ""
    needed = set().union(*[archive.needed_parts(digest, not options.to) for digest in lacking])
    complete = sum(report.complete for report in reports)
    for key, names in archive.parts.names.items():
        missing = part_numbers(needed, key)
        taken = parts_in_words(part_numbers(archive.parts.given - needed, key), names)
        if missing:
            yield "%s taken; %d of %d images complete; still needed: %s%s" % (
                taken, complete, len(reports), missing, advice)


# A list without it, given to save --have, would leave out what is wanted.
WANTED = ("# lacking here; for the next archive, where it was saved: tinyreg.py ls --digests | "
          "grep -vFf want.txt > have.txt, and save --have have.txt")


def load(options: argparse.Namespace) -> int:
    """Copy the images of archives into the store, or to another registry."""
    archives = list(filter(is_archive, options.images))
    if not archives:
        os.stat(options.images[0])  # raises the error: a wrong name makes no store
    options.images = [word for word in options.images if word not in archives]
    scratch, ranges = tempfile.gettempdir(), ""
    if options.to:
        target: Registry = open_remote(options, options.to.host)
    else:
        store = target = open_store(options, create=True)
        scratch, ranges = store.files.scratch, os.path.join(store.layout.own, "ranges")
    archive = Archive(archives, scratch, ranges, partly=True)
    if not archive.names:
        raise CommandError("no images in " + archive.root)
    transfer = Transfer(options, target)
    choices = None if options.images or options.file else [Choice("**")]
    reports = [transfer.add(choice, archive, *image) for choice, *image in iter_stored(
        options, archive, lambda image, why: transfer.fail(image, "no such file, and %s" % why),
        choices)]
    transfer.files = [{"file": path, "error": archive.unreadable.get(path)} for path in archives]
    status = transfer.run()
    if options.want:
        lines: List[str] = sorted(lacking_digests(reports))
        with open(options.want, "w") as file:
            file.writelines(line + "\n" for line in ([WANTED] if lines else []) + lines)
    if not options.dry_run and not options.to:
        keep_ranges(store, archive)
    problems = list(iter_problems(options, archive, reports))
    for line in problems:
        complain("tinyreg: " + line)
    return 1 if problems else status


# Files


def add(options: argparse.Namespace) -> int:
    """Store files as one image, or charts as an image each."""
    is_base = names_repository(options.to)
    (name, *_), tag = parse_local(options.to) if is_base else parse_local_tag(options.to)
    store = open_store(options, create=True)
    for paths in [[path] for path in options.files] if is_base else [options.files]:
        for path in paths:
            if not os.path.isfile(path):
                raise CommandError("%s is no file; of a folder, make a .tar.gz" % path)
        chart = read_chart(paths[0], store.layout.scratch) if not paths[1:] else None
        target = name, str(tag)
        if is_base:
            if not chart:
                raise CommandError("%s holds no Helm chart; for files, write --to %s:TAG"
                                   % (paths[0], name))
            target = (parse_name("%s/%s" % (name, chart["name"])),
                      parse_tag(chart["version"].replace("+", "_")))
        digest = put_artifact(store, *target, paths, chart)
        if not options.quiet:
            tell("%s is %s" % (image_text(*target), digest))
    return 0


def get(options: argparse.Namespace) -> int:
    """Write out the files of an artifact."""
    registry = (Archive(options.archives, tempfile.gettempdir()) if options.archives
                else open_store(options))
    name, reference = find_image(registry, options.image)
    digest = resolve_reference(registry, name, reference)
    files = files_in(registry, name, registry.manifest(name, digest))
    if not files:
        raise CommandError("%s holds no files: it is an image for containers, or an index"
                           % options.image)
    places = [place_for(options.output, title, options.force) for title in files]
    for path, blob in zip(places, files.values()):
        write_file(registry, name, blob.digest, path)
        if not options.quiet:
            tell(path)
    return 0


# login and logout


def parse_login_host(text: str) -> str:
    """The host of a registry, also as docker writes it. Raises CommandError."""
    host = login_key(text)
    if not HOST.fullmatch(host):
        raise CommandError("%r is no registry: write HOST or HOST:PORT" % text)
    return host


def ask_user(options: argparse.Namespace) -> str:
    """The user to log in as, from --user or the terminal. Raises CommandError."""
    user = options.user
    if user is None and not options.stdin and sys.stdin.isatty():
        with contextlib.suppress(EOFError):  # no name, which is said below
            user = input("user name at %s: " % options.host)
    if user is None:
        raise CommandError("say who logs in: --user NAME")
    return user


def log_in_to(options: argparse.Namespace) -> int:
    """Try a login at a registry, and keep it where docker or podman would."""
    host = options.host
    file = choose_login_file(host)
    helper = LoginFile(file).helper(host)
    if helper:
        raise CommandError("%s leaves the logins for %s to docker-credential-%s, so nobody would "
                           "read one in the file; log in with: docker login %s"
                           % (file, host, helper, host))
    user = ask_user(options)
    login = Login(user, read_password(user, options.stdin, is_new=False), None, file)
    try:
        is_checked = open_remote(options, host).try_login(login)
    except Refused:
        raise CommandError("%s does not take the user %s with this password; nothing was written"
                           % (host, user))
    replace_login(file, host, login)
    if not options.quiet:
        if not is_checked:
            complain("%s asked for no password, so this one was not checked" % host)
        tell("logged in to %s as %s; the password is in %s as base64, which is no encryption: who "
             "can read the file can read it" % (host, user, file))
    return 0


def log_out_from(options: argparse.Namespace) -> int:
    """Remove the login for a registry from every file in which it would be read."""
    host = options.host
    files = [file for file in login_files() if host in LoginFile(file).entries]
    for file in files:
        replace_login(file, host, None)
    login = find_login(host)
    if login:
        raise CommandError("%s has a login for %s; log out with: docker logout %s"
                           % (login.source, host, host))
    if not files:
        raise CommandError("there is no login for %s in %s" % (host, ", ".join(login_files())))
    if not options.quiet:
        tell("removed the login for %s from %s" % (host, ", ".join(files)))
    return 0


# The command line


def parse_positive(text: str) -> int:
    """A number from 1 to 9999. Raises CommandError, as do the functions below for their values."""
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise CommandError("%r is no number from 1 to 9999" % text)
    return int(text)


def parse_seconds(text: str, unit: str = "[smhd]?") -> float:
    """A time, such as 30, 30s, 5m, 24h or 7d, in seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%s)" % unit, text)
    if not match:
        raise CommandError("%r is no time with a unit: write for example 30s, 5m, 24h or 90d"
                           % text)
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def parse_size(text: str) -> int:
    """A number of bytes, such as 4096, 700M or 3.9G; the units are powers of 1024."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKMGT]?)(?:i?B)?", text)
    if not match:
        raise CommandError("%r is no size: write for example 700M or 3.9G" % text)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_quota(text: str) -> Quota:
    """GLOB=SIZE."""
    glob, _, size = text.rpartition("=")
    if "**" in glob or not re.fullmatch(r"[a-z0-9._/*-]+", glob):
        raise CommandError("%r is no quota: write for example students/*=2G; the glob names what "
                           "counts together, so ** can't be in it" % text)
    return Quota(glob, parse_size(size))


def parse_new_file(text: str) -> str:
    """The path of a file that can be written: who copies for hours should not learn at the end that
    it can't be. It will replace what is there, which must not be /dev/null."""
    folder = os.path.dirname(os.path.realpath(text))
    is_other = os.path.exists(text) and not os.path.isfile(text)
    if is_other or not os.access(folder, os.W_OK):
        raise CommandError("%r can't be written; name a file in a folder that is there" % text)
    return text


# None of them has images of other origins under their names.
PUBLIC_REGISTRIES = ("docker.io", "quay.io", "ghcr.io", "gcr.io", "registry.k8s.io",
                     "public.ecr.aws", "mcr.microsoft.com", "nvcr.io", "registry.gitlab.com")


def parse_upstream(text: str) -> Tuple[str, str, bool, str]:
    """NS=URL as (NS, host, whether it speaks plain HTTP, prefix of the names there)."""
    # Others want the /v2 of the API in their URLs.
    match = re.fullmatch(r"(\*|{0})=(?:(https?)://)?({0})(?:/v2(?=/|$))?(?:/(.*?))?/*".format(
        HOST.pattern), text)
    if not match:
        raise CommandError("%r is no upstream: write for example "
                           "docker.io=https://registry-1.docker.io" % text)
    space, scheme, host, prefix = match.groups()
    if space == "*" and canonical_host(host) in PUBLIC_REGISTRIES:
        raise CommandError("*= is for a tinyreg that has the images of all origins, and %s has its "
                           "own: write %s=%s" % (host, canonical_host(host), text[2:]))
    return origin_of(space), canonical_host(host), scheme == "http", prefix + "/" if prefix else ""


# What help prints, for whoever has this file and nothing else. The example lines of lesson are run
# by a test, those of the others are for people to change.
TOPICS = {
    "gc": """\
A tag points to a manifest, and that to blobs. Deleting a tag leaves the manifest, and deleting a
manifest leaves its blobs, which another image may need. gc deletes what nothing refers to.

    tinyreg.py gc --dry-run             what would go, and what has to wait until when
    tinyreg.py gc                       blobs that no manifest needs
    tinyreg.py gc --untagged            and manifests that no tag leads to
    tinyreg.py gc --keep 10 --older-than 90d --repositories 'team/**' --dry-run     old tags

It runs beside servers. What a client pushed or asked for within the last hour stays, because a
push may be under way; while nobody pushes, --grace 0 does not wait. By itself: serve --gc-every 24h
""",
    "disk-full": """\
Pushes are refused with 507, pulls go on, and nothing that was pushed is lost. rm and gc need no
free space. ("denied: over the quota" is not the disk: serve --quota says so.)

    df -h registry; df -i registry      is it full, or has it no inodes left?
    tinyreg.py gc --dry-run             what would go, and what has to wait
    tinyreg.py gc --untagged --grace 0  while nobody pushes
    tinyreg.py rm NAME:TAG              what is not needed any more; then gc again

http://HOST:5000/disk shows the largest repositories. Delete nothing in registry/ by hand. Else move
it: stop the server, cp -a registry /larger/registry, and serve --root /larger/registry
Against the next time: serve --gc-every 24h --min-free 10G --quota 'team/*=20G'
""",
    "clients": """\
On the server, this prints a script for the client, to be run there as root. CLIENT is docker,
containerd, podman, k3s, or system for all that trust what the system trusts (docker build, crane,
helm, oras, cosign). Without TLS add --plain-http; http://HOST:5000/use has the scripts, too.

    tinyreg.py clients CLIENT --host HOST:5000

What clients say, and what to do:
  server gave HTTP response to HTTPS client   no TLS here: run that script with --plain-http
  certificate signed by unknown authority     run that script; for docker build: CLIENT is system
  certificate is not valid for, or valid for  serve --tls-name NAME, and start it again
  expired or not yet valid                    a clock is wrong: sudo date -s '2026-11-24 14:00'
  no basic auth credentials, unauthorized     docker login HOST:5000
  denied                                      the message says which option or rule allows it
  connection refused                          serve --listen :5000; else only this machine connects
  no route to host, i/o timeout               the firewall: sudo firewall-cmd --add-port=5000/tcp
                                              or sudo ufw allow 5000/tcp

Plain HTTP, if asked each time: podman, buildah --tls-verify=false; skopeo --src-tls-verify=false or
--dest-tls-verify=false; crane --insecure; oras, helm --plain-http; cosign --allow-http-registry
""",
    "tls": """\
    tinyreg.py serve --listen :5000 --tls --tls-name registry.lab --users users
    tinyreg.py clients docker --host registry.lab:5000      then run what it prints on the clients

serve --tls makes a CA, and a certificate for all names of this machine, which it renews. They lie
in registry/tinyreg/tls. Keep ca.key to yourself, and the folder when you delete the store: with a
new CA all clients have to be set up again.

    openssl x509 -in registry/tinyreg/tls/server.pem -noout -dates -ext subjectAltName
    curl --cacert registry/tinyreg/tls/ca.crt https://registry.lab:5000/v2/

A client whose clock is wrong says that the certificate has expired or is not yet valid.
With a certificate of your own: serve --tls-cert FILE --tls-key FILE; it is read again when it
changes.
""",
    "mirror": """\
Clients ask here first for images of other registries, under their own names. Images keep their
origin: tinyreg.py pull alpine stores docker.io/library/alpine.

    tinyreg.py clients containerd --host HOST:5000 --mirror     or podman, k3s, docker
    curl 'http://HOST:5000/v2/library/alpine/tags/list?ns=docker.io'      what such a client gets

docker before 29 knows mirrors of docker.io only. docker and containerd send no login: let all pull
(--anonymous pull), or clients --mirror --user NAME. Is it asked at all? serve --log explain

    tinyreg.py serve --listen :5000 --upstream docker.io=https://registry-1.docker.io

fetches what is missing, where there is a network. Away upstreams are no harm to what is here.
""",
    "parts": """\
    tinyreg.py save -f images.txt -o images.tar --split 3900M     writes images-1of3.tar and so on
    tinyreg.py verify images-*of3.tar     names what is damaged: copy that part again
    tinyreg.py load images-1of3.tar       each by itself, in any order; says which are still to come
    tinyreg.py ls images-*of3.tar         complete, or what is lacking

Until the last part load exits with 1 and sets no tag; what came is kept in registry/tinyreg/ranges.
With --to, and for serve, name all parts at once. docker load and podman load can't join them.
A part is lost: write it again by the same save from the same store; same images, same bytes.
""",
    "systemd": """\
# tinyreg as a service: a user of its own, its store in /var/lib/tinyreg, and nothing of the host
# that it does not need. Options go into /etc/default/tinyreg, such as TINYREG_LISTEN=:5000
#   install -m 755 tinyreg.py /usr/local/bin/tinyreg
#   tinyreg help systemd > /etc/systemd/system/tinyreg.service
#   systemctl enable --now tinyreg; journalctl -u tinyreg
# A store that is there already: mv it to /var/lib/tinyreg before the first start, which makes it
# the service's. Files that it is to read, such as that of --users: useradd --system tinyreg before
# that, and chown tinyreg FILE.
[Unit]
Description=tinyreg, a container registry
After=network.target
RequiresMountsFor=/var/lib/tinyreg

[Service]
Type=notify
NotifyAccess=all
EnvironmentFile=-/etc/default/tinyreg
Environment=TINYREG_ROOT=/var/lib/tinyreg
ExecStart=/usr/local/bin/tinyreg serve
ExecReload=/bin/kill -HUP $MAINPID
WatchdogSec=60
Restart=on-failure
KillMode=mixed
TimeoutStopSec=60
LimitNOFILE=65536
DynamicUser=yes
StateDirectory=tinyreg
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes

[Install]
WantedBy=multi-user.target
""",
    "lesson": """\
A registry in ten steps, without a network. It takes docker, curl, this file in an empty folder, and
two terminals. In the first one:        python3 tinyreg.py serve --log explain
Open http://localhost:5000/live in a browser. The lines below are for the second terminal. In quotes
is what /live shows for them; the first terminal says the same.

1. Push an image. Its only layer has one file.
    echo hello > hello.txt
    tar -c hello.txt | docker import - localhost:5000/lesson:1
    docker push localhost:5000/lesson:1
   "has lesson the blob", "no, so the client sends it", "here are bytes of a blob", and the manifest
   at the end: "here is the manifest of lesson:1"
2. Push it again: "already there". Every blob is named by the digest of its bytes.
    docker push localhost:5000/lesson:1
   "yes, so it need not be sent"
3. Pull by digest. No one can move that to another image.
    url=http://localhost:5000/v2/lesson
    d=$(curl -sI $url/manifests/1 | grep -o 'sha256:[0-9a-f]*' | head -n 1)
    docker image rm localhost:5000/lesson:1
    docker pull localhost:5000/lesson@$d
   "the manifest lesson@sha256:", "here it is"
4. Look at the manifest: a config, and layers, each with its digest and size.
    curl $url/manifests/1
    curl $url/tags/list
   "the manifest lesson:1, please", "which tags has lesson?"
5. Move a tag: the same name for another image.
    echo bye > hello.txt
    tar -c hello.txt | docker import - localhost:5000/lesson:1
    docker push localhost:5000/lesson:1
    python3 tinyreg.py ls --history lesson:1
   "from now on let it be pulled"
6. Undo. That is done in the store: /live shows only the pull.
    python3 tinyreg.py tag --undo lesson:1
    docker pull localhost:5000/lesson:1
   "which manifest is lesson:1 at the moment?", and then the digest of step 3
7. Delete the tag. What it pointed to is still there, by its digest.
    python3 tinyreg.py rm lesson:1
    docker pull localhost:5000/lesson:1      # fails
    docker pull localhost:5000/lesson@$d
   "that is not here"
8. Collect garbage: now what no tag leads to goes, and its bytes come back.
    python3 tinyreg.py gc --untagged --grace 0
    curl $url/manifests/$d
   "that is not here"
9. Pull one platform of two. The tag points to an index, and that to an image for each.
    r=localhost:5000/lesson
    tar -c hello.txt | docker import - $r:amd64
    tar -c hello.txt | docker import - $r:arm64
    docker push $r:amd64
    docker push $r:arm64
    docker manifest create --insecure $r:2 $r:amd64 $r:arm64
    docker manifest annotate --arch amd64 $r:2 $r:amd64
    docker manifest annotate --arch arm64 $r:2 $r:arm64
    docker manifest push --insecure $r:2
    docker pull --platform linux/arm64 $r:2
   "here is the manifest of lesson:2"; then the index is pulled, and one of its two images
10. Break a blob, and mend it: damage is named, put aside, and pushed again.
    b=$(curl -s $url/manifests/arm64 | grep -o 'sha256:[0-9a-f]*' | tail -n 1 | cut -c 8-)
    echo broken | tee registry/docker/registry/v2/blobs/sha256/*/$b/data
    python3 tinyreg.py verify --repair       # fails, and names what is harmed
    docker push $r:arm64
    python3 tinyreg.py verify
   "no, so the client sends it": only the layer that was broken
""",
}


def print_help(options: argparse.Namespace) -> int:
    """Print what there is on a topic, or which topics there are."""
    text = TOPICS.get(options.topic) or (
        "topics: %s\nfor one: tinyreg.py help TOPIC" % ", ".join(TOPICS))
    for line in text.splitlines():
        tell(line)
    return 0


class Option(NamedTuple):
    """An option of a command, or a word that it takes: the arguments of argparse's
    add_argument()."""

    names: List[str]
    settings: Dict[str, Any]


# How the value of an option is read, or which values there are: by the name of the option, or else
# by the word that stands for its value.
VALUES: Dict[str, Any] = {
    "--lock": parse_new_file, "--plan": parse_new_file, "--retries": int, "--signed-by": read_keys,
    # Who writes --older-than 90 means days.
    "--older-than": functools.partial(parse_seconds, unit="[smhd]"),
    "CLIENT": CLIENTS, "FROM=TO": parse_rename, "GLOB": parse_glob, "GLOB=SIZE": parse_quota,
    "HOST[:PORT]": parse_login_host, "HOST[:PORT][/PREFIX]": parse_destination, "LEVEL": LEVELS,
    "N": parse_positive, "NET": parse_network, "NS=URL": parse_upstream, "RANGE": parse_versions,
    "SIZE": parse_size, "STYLE": list(LOG_FORMATS) + ["explain", "off"], "TIME": parse_seconds,
    "TOPIC": TOPICS, "URL": Endpoint, "[HOST]:PORT": parse_listen,
}


def read_options(text: str) -> Iterator[Option]:
    """Yield the options, and the words without dashes, that a text describes. A line has the names,
    what stands for the value (a switch has none), and more arguments of argparse's add_argument().
    The lines below it are the help; what has none is not shown."""
    for names, kind, more, lines in re.findall(
            r"^([-a-z ]+)(?:([A-Z[]\S*)((?: .*)?))?\n((?: .*\n)*)", text, re.MULTILINE):
        settings: Dict[str, Any] = {"help": lines.strip() or argparse.SUPPRESS}
        settings.update(word.split("=") for word in more.split())
        if "default" in settings:
            settings["help"] += " (default: %(default)s)"
        if settings.get("action") == "append":
            settings["default"] = []
        if kind:
            read = VALUES.get(names.split()[-1]) or VALUES.get(kind, str)
            settings.update({"metavar": kind, "type" if callable(read) else "choices": read})
        else:
            settings["action"] = "store_true"
        yield Option(names.split(), settings)


COMMON_OPTIONS = """\
--root DIR
    directory of the store (TINYREG_ROOT) (default: %(default)s)
--quiet
    say nothing but errors
"""
AS_JSON = """\
--json
    print JSON
"""
SIGNED_BY = """\
--signed-by FILE action=append
    refuse and name what none of the public keys in this file (PEM: ECDSA P-256, RSA, Ed25519)
    has signed with cosign; keyless signatures and Notation's don't count; may be repeated
    (default: take anything)
"""

# Each of these, and of COMMON_OPTIONS, is a variable of the environment as well.
SERVE_OPTIONS = """\
archives ARCHIVE nargs=*
    serve the images in these archives instead of the store, read-only
--listen [HOST]:PORT action=append
    address to listen on; :5000 is every address; may be repeated (default: 127.0.0.1:5000,
    which Docker trusts without TLS)
--anonymous LEVEL
    what clients without a password may do: none, pull, push or admin, which deletes (default:
    none with --users or --tls-client-ca; else admin if only this machine can reach it, and pull
    if others can)
--users FILE
    htpasswd file of those who may log in; see tinyreg.py passwd
--rules FILE
    lines REPOSITORY-GLOB USER|*|@anonymous pull|push|admin|none; the last that matches counts;
    * stays within one component of a name, ** does not; the user * is everyone who has logged
    in; {user} in the glob is the name of who asks (without rules users may do everything)
--metrics-open
    with --users: let everyone read /metrics, for a Prometheus without a password
--tls
    serve HTTPS, with a CA and a certificate for this host that are made and renewed as needed
    (with the openssl command); clients get the CA at /ca.crt; see tinyreg.py clients
--tls-name NAME action=append
    one more name or address to make the certificate for; may be repeated
--tls-cert FILE
    serve HTTPS with this certificate (and its chain, PEM)
--tls-key FILE
    its key, unless that is in the same file
--tls-client-ca FILE
    take only clients with a certificate from this CA; its subject's CN is the user
--trusted-proxy NET action=append
    address or network of a proxy or load balancer whose X-Forwarded-For tells who the client
    is; may be repeated (default: this machine's alone)
--sparse
    take image manifests whose blobs are missing (pulls of such an image fail)
--read-only
    refuse pushes and deletions
--shared
    servers on other hosts have this directory too: keep no answers in memory; the README says
    what the file system must promise, and how to mount NFS
--immutable-tags GLOB action=append
    tags (v*) or images (prod/**:*) that clients can't move or delete; may be repeated (default:
    none)
--notify URL action=append
    POST events to this URL, in Distribution's format; may be repeated; settings follow a #:
    actions=push,mount,delete,pull & repositories=GLOB,... & secret=FILE & headers=FILE
    (default: none)
--log STYLE default=text
    text, json, off, or explain, which says in words what happens
--log-file FILE
    log there; SIGHUP opens it anew (default: stderr)
--workers N default=%d
    processes that serve
--upstream NS=URL action=append
    fetch what is missing below NS/ from URL, and keep it; may be repeated; logins are those of
    docker login; pushes below NS/ are refused (example:
    docker.io=https://registry-1.docker.io); *=URL is another tinyreg, for all origins that are
    not named
--upstream-ttl TIME default=5m
    how long a tag is taken as right before the upstream is asked again
--drain TIME default=30s
    how long running transfers may take to end after SIGTERM
--min-free SIZE default=0
    refuse uploads that would leave less than this free on the disk, for example 10G
--max-blob SIZE default=0
    refuse blobs that are larger; 0 is no limit
--quota GLOB=SIZE action=append
    refuse what would make the repositories below each name that fits larger than this, for
    example students/*=2G; content that several of them have counts once; the last that fits
    counts; may be repeated (default: none)
--gc-every TIME default=0
    delete what nothing refers to this often, for example 24h; 0 is never
--grace TIME default=%dh
    how long --gc-every leaves what a client was told about
""" % (min(4, cores()), GRACE_HOURS) + SIGNED_BY

CHOICE = """\
--exclude GLOB action=append
    leave out what has a TAG or NAME:TAG that fits; may be repeated
--newest N
    take the N newest of the tags that a pattern fits in a repository: in the order of versions,
    with runs of digits as numbers; pre-releases (-rc -alpha -beta -dev) and cosign's tags only
    if the pattern names them (default: all)
--versions RANGE
    of the tags that a pattern fits, take the releases whose version lies in this range, for
    example '>=3.18,<4' (default: all)
"""
# How a command is told more images than its line names, and that it may report in JSON.
IMAGE_OPTIONS = AS_JSON + """\
-f --file FILE action=append
    take the images that FILE names as well: a list, one a line, # begins a comment; or, if it
    has an image: key or a FROM, YAML, JSON or a Dockerfile; there what else looks like an image
    is tried, too; - is stdin
""" + CHOICE
STRIP = """\
--strip
    take out of an index what does not go along (--platform), for registries that refuse it
    otherwise; its digest changes, those of its images and their signatures don't; where one
    image is left, the tag points to that
"""
RENAME = """\
--rename FROM=TO action=append
    copy what begins with FROM, such as docker.io/library, under names that begin with TO
    instead; of several the longest FROM counts; may be repeated
"""
LOGIN_HOST = """\
host HOST[:PORT]
    the registry; docker.io is Docker Hub
"""
CONNECTION_OPTIONS = """\
--retries N default=5
    how often a request is tried again, with longer and longer pauses
--ca FILE
    trust the certificates of this CA (PEM) as well
--insecure
    don't check certificates, and take plain HTTP where there is no TLS: whoever is on the way
    can read passwords and change tags
--plain-http
    use HTTP: whoever is on the way can read passwords and change tags
"""
REMOTE_OPTIONS = """\
--jobs N default=4
    how many images are planned, and blobs copied, at once
--rate SIZE default=0
    copy at most so much a second in all, for example 2M; 0 is no limit
""" + CONNECTION_OPTIONS
COPY_OPTIONS = """\
--platform OS/ARCH[/VARIANT] action=append
    copy images for this platform only; may be repeated; the index keeps its digest (default:
    all)
--no-referrers
    leave signatures, SBOMs and the like behind
--dry-run
    say what would be copied, and copy nothing
--lock FILE
    write a line NAME:TAG@DIGEST into FILE for each image that was copied, with its name before
    --rename; pull -f FILE takes these bytes again
""" + SIGNED_BY


REMOTE_NOTES = """
Logins are those of tinyreg.py login, docker login and podman login. HTTPS_PROXY, HTTP_PROXY and
NO_PROXY in the environment are honoured."""


# By its name what runs a command, and its help: the first line is what the list of commands shows.
# The options are as read_options() has them.
COMMANDS: Dict[str, Tuple[Callable[[argparse.Namespace], int], str]] = {
    "serve": (serve, """\
Serve the store to clients that push and pull (what tinyreg.py does without a command).
Each option is a variable in the environment, too: --log-file is TINYREG_LOG_FILE.
Where an option may be repeated, spaces separate the values.

examples:
  tinyreg.py serve
  tinyreg.py serve --root /srv/registry --listen :5000 --anonymous push
  tinyreg.py serve --listen :5000 --tls --users users --rules rules
  tinyreg.py serve --listen :5000 --upstream '*=http://centre.lab:5000'
  tinyreg.py serve /media/usb/images.tar

options:
""" + SERVE_OPTIONS),
    "pull": (pull, """\
Copy images from their registries into the store.""" + REMOTE_NOTES + """

examples:
  tinyreg.py pull alpine:3.19 quay.io/prometheus/prometheus:v2.53.0
  tinyreg.py pull -f images.txt --platform linux/amd64 --dry-run
  tinyreg.py pull 'alpine:3.*' --newest 3
  tinyreg.py pull 'alpine:*' --versions '>=3.18,<4'
  helm template CHART | tinyreg.py pull -f -
  tinyreg.py pull -f images.txt --lock images.lock
  tinyreg.py pull -f images.lock --via harbor.lab/proxy-docker

options:
images IMAGE nargs=*
    as docker pull takes it; * may stand in a tag
--via HOST[:PORT][/PREFIX]
    fetch docker.io's images from this mirror of it; they keep their names
""" + IMAGE_OPTIONS + COPY_OPTIONS + RENAME + REMOTE_OPTIONS),
    "push": (push, """\
Copy images from the store to another registry.""" + REMOTE_NOTES + """

examples:
  tinyreg.py push alpine:3.19 --to lab.example:5000
  tinyreg.py push -f images.txt --to lab.example/mirror
  tinyreg.py push alpine:3.19 --to harbor.lab/mirror --platform linux/amd64 --strip
  tinyreg.py push -f images.txt --to lab.example --rename docker.io=hub --rate 2M

options:
images IMAGE nargs=*
    as pull took it, or as ls shows it; * may stand in the name and the tag
--to HOST[:PORT][/PREFIX] required=yes
    the registry, and what its repositories' names begin with
""" + IMAGE_OPTIONS + COPY_OPTIONS + STRIP + RENAME + REMOTE_OPTIONS),
    "login": (log_in_to, """\
Try a login at another registry, and keep it for pull, push and load.
It is kept where docker login keeps it, or podman login if only that was used, so these use it, too:
in $REGISTRY_AUTH_FILE, ~/.docker/config.json or containers/auth.json. There it is base64, which is
no encryption. HTTPS_PROXY, HTTP_PROXY and NO_PROXY in the environment are honoured.

examples:
  tinyreg.py login registry.lab:5000
  tinyreg.py login quay.io --user ci --stdin < ci-password
  tinyreg.py login docker.io --user alice

options:
""" + LOGIN_HOST + """\
--user NAME
    who logs in (default: the terminal is asked)
--stdin
    read the password from a line on standard input
""" + CONNECTION_OPTIONS),
    "logout": (log_out_from, """\
Remove the login for another registry.

examples:
  tinyreg.py logout registry.lab:5000

options:
""" + LOGIN_HOST),
    "save": (save, """\
Write images of the store into an archive.

examples:
  tinyreg.py save alpine nginx:1.25 -o images.tar
  tinyreg.py save '**' -o images.tar
  tinyreg.py save -f images.txt -o images.tar --have have.txt --split 3900M
  tinyreg.py save alpine -o - | ssh HOST docker load
  tinyreg.py save alpine -o - | gpg -c > images.tar.gpg

options:
images IMAGE nargs=*
    NAME[:TAG] or NAME@DIGEST; * stands for a part of a component or tag, ** for anything
-o --output FILE required=yes
    the archive; - is stdout
--no-self
    leave out tinyreg.py itself
--have FILE action=append nargs=+
    leave out the blobs that are in these lists (what `ls --digests` or `load --json` said on
    the far side, or `save --json` here) or archives; images are named before it; may be
    repeated
--split SIZE
    write parts of at most this size, for example 3900M for a FAT32 stick (default: one file)
""" + IMAGE_OPTIONS + COPY_OPTIONS + STRIP),
    "load": (load, """\
Put the images of archives into the store.

examples:
  tinyreg.py load images.tar
  tinyreg.py load rke2-images.linux-amd64.tar.zst
  tinyreg.py load images-*.tar --want want.txt
  tinyreg.py load images.tar alpine:3.19 'team/**'
  tinyreg.py load images.tar --json > receipt.json     # for save --have
  tinyreg.py load images.tar --to registry.lab:5000
  tinyreg.py load images.tar --signed-by cosign.pub
  docker save alpine | tinyreg.py load -
  gpg -d images.tar.gpg | tinyreg.py load -

options:
images FILE|IMAGE nargs=+
    an OCI image layout or what docker save wrote, as tar, .tar.gz (or .zst, .xz, .bz2) or
    directory; a haul of hauler, a package of zarf, a flat image cache of Talos; a registry's
    data directory; - is stdin; what is no file names images: only these are taken
--want FILE
    write the digests that are missing into this file
--to HOST[:PORT][/PREFIX]
    put them into this registry, not into the store
""" + IMAGE_OPTIONS + COPY_OPTIONS + STRIP + RENAME + REMOTE_OPTIONS),
    "add": (add, """\
Store files, or Helm charts, beside the images, as oras and helm push them.
What is stored goes through save, load, pull and push, and oras, helm, skopeo and curl
(/files/NAME:TAG/FILE) get it. The same files always make the same digest. A chart's config has the
fields of Chart.yaml that are one text; maintainers, dependencies and other lists are in the chart
alone, which is where helm reads them.

examples:
  tinyreg.py add install.sh rke2.tar.gz --to rke2/files:v1.34
  tinyreg.py add web-1.2.3.tgz --to charts     # is charts/web:1.2.3

options:
files FILE nargs=+
    what to store, under its name without folders; a single .tgz that holds a Chart.yaml is
    stored as a chart, with FILE.prov if that is there
--to NAME[:TAG] required=yes
    the tag that they get, which is moved if it is there, whatever a server's --immutable-tags
    say; without TAG each FILE is a chart and becomes NAME/CHART:VERSION, a + in the version as
    _
"""),
    "get": (get, """\
Write out the files of an artifact: what add, oras or helm have stored.

examples:
  tinyreg.py get rke2/files:v1.34 -o /opt/rke2
  tinyreg.py get charts/web:1.2.3
  tinyreg.py get charts/web:1.2.3 --from images.tar

options:
image IMAGE
    NAME[:TAG] or NAME@DIGEST
-o --output DIR default=.
    the folder; made if it is not there
--force
    replace files that are there, which is an error otherwise
--from ARCHIVE action=append dest=archives
    read it from this archive, not from the store; may be repeated
"""),
    "ls": (list_store, """\
List repositories, images, or what archives hold.

examples:
  tinyreg.py ls
  tinyreg.py ls alpine quay.io/a/b:1.0 'team/**'
  tinyreg.py ls images.tar
  tinyreg.py ls --history alpine:3.19
  tinyreg.py ls --digests > have.txt

options:
images IMAGE nargs=*
    list the tags of NAME, or NAME:TAG, or what is in an archive, with sizes, platforms and (in
    the store) times of pushes
--tags
    list the tags of all repositories
--history
    list what each NAME:TAG points to and has pointed to, and since when; the latest first
--digests
    list every blob held instead
""" + AS_JSON + CHOICE),
    "tag": (set_tag, """\
Give an image of the store one more tag, or take a tag's last move back.

examples:
  tinyreg.py tag alpine:3.19 alpine:stable
  tinyreg.py tag ci/app@sha256:0123... team/app:1.0
  tinyreg.py tag --undo team/app:1.0

options:
image IMAGE
    NAME:TAG or NAME@DIGEST; with --undo the tag
tag NAME:TAG nargs=?
    the new tag, in the same repository or in another one; a tag that is there already is moved,
    whatever a server's --immutable-tags say
--undo
    let the tag point to what it pointed to before; a second time takes that back
"""),
    "rm": (remove, """\
Delete tags and manifests.

examples:
  tinyreg.py rm alpine:3.19
  tinyreg.py rm alpine@sha256:0123...
  tinyreg.py rm 'student*/**' --dry-run

options:
images IMAGE nargs=*
    NAME:TAG deletes the tag; NAME@DIGEST deletes the manifest and every tag that points to it;
    with * all that fits
--dry-run
    only say what would go, and what that frees
--yes
    delete also more than %d images, every name (**), or what --newest takes (it is gc --keep
    that lets the newest stay)
""" % MANY + IMAGE_OPTIONS),
    "gc": (collect, """\
Delete what nothing refers to; safe beside a running server.

examples:
  tinyreg.py gc --dry-run
  tinyreg.py gc
  tinyreg.py gc --untagged --grace 7d
  tinyreg.py gc --keep 10 --older-than 90d --repositories 'team/**' --dry-run
  tinyreg.py gc --only images.txt --plan going.txt

options:
--untagged
    also delete manifests that no tag leads to, itself or over an index or a subject
--keep N
    delete the tags of each repository except the N that were last pushed (load and pull count
    as well), and the manifests to which no other tag leads, with their signatures; it does not
    know of a server's --immutable-tags (default: all are kept)
--older-than TIME
    delete the tags that were last pushed longer ago, for example 90d, likewise; with --keep
    only what both would delete (default: any age is kept)
--only FILE action=append
    delete, likewise, the tags that no list names; a FILE is read as by pull -f, also a pattern
    or a lock file, but any NAME:TAG in it counts; NAME:TAG@DIGEST keeps the tag wherever it
    points, NAME alone keeps NAME:latest; may be repeated
--plan FILE
    as --dry-run, and write the tags that would go into FILE, for people to review, and for rm
    -f, which deletes those that still point there
--repositories GLOB
    in which repositories --keep, --older-than and --only delete tags; * stays within one
    component, ** does not (default: all)
--force
    let tags expire also where their times and this machine's clock don't go together
--grace TIME default=%dh
    leave what was pushed, or a client was told about, this short ago
--dry-run
    only list what would go, with its size
""" % GRACE_HOURS + AS_JSON),
    "verify": (verify, """\
Read everything again; name what is damaged, and what it harms.

examples:
  tinyreg.py verify --rate 50M
  tinyreg.py verify --repair
  tinyreg.py verify alpine:3.19 'team/**'
  tinyreg.py verify /media/stick/images-*.tar --signed-by cosign.pub

options:
images IMAGE|FILE nargs=*
    re-read these images of the store, or archives (default: the whole store)
--rate SIZE default=0
    read so much a second; 0 is no limit
--repair
    move what is damaged into ROOT/tinyreg/damaged, so that pushing the image again mends it
--dry-run
    with --repair: only list what would be moved
""" + SIGNED_BY + IMAGE_OPTIONS),
    "passwd": (passwd, """\
Set the password of a user of a registry that has --users.

examples:
  tinyreg.py passwd alice --users /etc/tinyreg/users
  tinyreg.py passwd ci --users /etc/tinyreg/users --stdin < ci-password
  tinyreg.py passwd --users /etc/tinyreg/users --stdin < class.txt
  tinyreg.py passwd alice --users /etc/tinyreg/users --delete
  tinyreg.py passwd --list --users /etc/tinyreg/users

options:
user USER nargs=?
    letters, digits and most else, but no colon and no space
--users FILE required=yes
    the htpasswd file; made if it is not there
--list
    list the users instead
--stdin
    read the password from a line on standard input; without USER, lines of a user, a space and
    a password each
--delete
    remove the user
"""),
    "clients": (clients, """\
Print shell scripts that make clients trust the registry.

examples:
  tinyreg.py clients docker --host registry.lab:5000
  tinyreg.py clients containerd --mirror | ssh root@node sh
  tinyreg.py clients containerd --mirror --user node < password > setup.sh
  tinyreg.py clients docker --install

options:
client CLIENT nargs=?
    one of %(choices)s
--host HOST:PORT
    what clients call the registry (default: this host's name, and port 5000)
--mirror
    let them take images of every origin from it, too
--known-origins
    with --mirror: only of the origins that the store has images of
--user NAME
    who pulls from the mirror, if it wants a password, which is read from standard input and
    gets into the script (docker, containerd)
--install
    run the script here instead of printing it
--server-ca FILE
    the CA of the registry's certificate; system, if clients trust it already, such as a proxy's
    (default: the one that serve --tls has made)
--ca FILE dest=server_ca
--plain-http
    the registry has no TLS
"""),
    "help": (print_help, """\
Print what is needed at night, without the README.

examples:
  tinyreg.py help
  tinyreg.py help disk-full
  tinyreg.py help systemd > /etc/systemd/system/tinyreg.service

options:
topic TOPIC nargs=?
    one of %(choices)s
"""),
}


def variable_of(option: str) -> str:
    """The variable of the environment for an option of serve: --log-file is TINYREG_LOG_FILE."""
    return "TINYREG_" + option.lstrip("-").replace("-", "_").upper()


VARIABLES = {variable_of(option.names[0]): option
             for option in read_options(COMMON_OPTIONS + SERVE_OPTIONS)
             if option.names[0].startswith("--")}
YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")


def with_environment(words: List[str], fail: Callable[[str], None]) -> List[str]:
    """The arguments of serve, and before them those that the environment sets: the command line
    counts more, so an option that it names is not taken from there.

    Calls `fail` for a variable that is wrong: serve should not run without what it was to say.
    Kubernetes sets some for a Service called tinyreg, such as TINYREG_PORT."""
    named = {word.partition("=")[0] for word in words}
    added = []
    for variable, text in os.environ.items():
        if variable not in VARIABLES:
            if variable.startswith("TINYREG_") and not re.search(
                    "_SERVICE_(HOST|PORT)|_PORT_[0-9]|_PORT=[a-z]+:", variable + "=" + text):
                fail("%s is set, but there is no such option" % variable)
            continue
        (name, *_), settings = VARIABLES[variable]
        action = settings.get("action")
        if not text or name in named:
            continue
        if action != "store_true":
            values = text.split() if action == "append" else [text]
            added += ["%s=%s" % (name, value) for value in values]
        elif text.lower() in YES:
            added.append(name)
        elif text.lower() not in NO:
            fail("%s is %r: write 1 for yes, 0 for no" % (variable, text))
    return added + words


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and ends the program with exit status 2."""

    commands: Mapping[str, argparse.ArgumentParser] = {}  # by their names

    def error(self, message: str) -> NoReturn:
        match = re.match("argument (--[a-z-]+)", message)
        variable = variable_of(match[1]) if match else ""
        if os.environ.get(variable):
            message += "; %s is set" % variable
        line = "%s: %s (see %s --help)" % (self.prog, message, self.prog)
        self.exit(2, fitted(line, sys.stderr) + "\n")


def build_parser() -> Parser:
    """The parser of the command line, which is made of COMMANDS."""
    parser = Parser(
        prog="tinyreg.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A container registry in one file.",
        epilog="examples:\n"
               "  python3 tinyreg.py                        serve ./registry on 127.0.0.1:5000\n"
               "  python3 tinyreg.py serve --listen :5000   serve it to the network\n"
               "  python3 tinyreg.py serve --help           the options of a command\n")
    parser.add_argument("--version", action="version", version="tinyreg " + __version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    parser.commands = commands.choices
    for name, (function, text) in COMMANDS.items():
        purpose, examples, options = re.split("\n\n(?:examples|options):\n", text)
        first = purpose.splitlines()[0]
        command = commands.add_parser(
            name, help=first[0].lower() + first[1:].rstrip("."), description=purpose,
            epilog="examples:\n" + examples, formatter_class=argparse.RawDescriptionHelpFormatter)
        for names, settings in read_options(COMMON_OPTIONS + options):
            command.add_argument(*names, **settings)
        command.set_defaults(function=function, root=default_root())
    return parser


def with_command(words: List[str], parser: Parser) -> List[str]:
    """The command line with its command first, which is serve if none is named, and with what the
    environment sets. Ends the program if the command is not the first word."""
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words = ["serve"] + words
    if words[0] == "help" != words[-1] in set(parser.commands).difference(TOPICS):
        return [words[-1], "--help"]
    if words[0] != "serve":
        return words
    for before, word in zip(words, words[1:]):
        if word in parser.commands and not before.startswith("-") and not os.path.exists(word):
            parser.error("write the command first: tinyreg.py %s ..." % word)
    if {"-h", "--help"} & set(words):  # errors about variables send people here
        return words
    return ["serve"] + with_environment(words[1:], parser.commands["serve"].error)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 130 ended by Ctrl-C; a wrong
    command line ends the program with 2."""
    parser = build_parser()
    words = with_command(list(sys.argv[1:] if argv is None else argv), parser)
    options, unknown = parser.parse_known_args(words)
    if unknown:  # the help of the command has the options, and the parser would name its own
        parser.commands[options.command].error("unrecognized arguments: " + " ".join(unknown))
    options.arguments = words
    start_logging("command")
    try:
        try:
            with contextlib.ExitStack() as options.at_end:
                return options.function(options)
        finally:
            flush_output()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        return 1
    except (CommandError, RegistryError, OSError) as error:  # it says what to do
        complain("tinyreg: " + error_text(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())
