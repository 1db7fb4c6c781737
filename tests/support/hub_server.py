# SPDX-License-Identifier: Apache-2.0
"""A small Hub-compatible server for tests (standard library only), on the loopback address only.

`serve` starts it in a thread; HF_ENDPOINT must name it before huggingface_hub is imported (hub_client.py).

Tokens: hf_alice (write), hf_alice_ro (read), hf_bob (write).
With `xet=True` large files travel by Xet (this server is also the CAS: /v1/xorbs, /v1/shards, /v1/reconstructions),
otherwise by git-LFS (the client needs HF_HUB_DISABLE_XET=1). `hub.drops` breaks downloads of large files.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_EXT = (
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .parquet .arrow .npy .npz .gguf .model .tar .gz .zip "
    ".png .jpg .jpeg .wav .mp3 .mp4 .pkl .pickle .joblib"
).split()
REGULAR_MAX = 10 * 1024 * 1024  # bigger than this -> lfs whatever the name (as the Hub: 10 MB)
TOKENS = {"hf_alice": ("alice", "write"), "hf_alice_ro": ("alice", "read"), "hf_bob": ("bob", "write")}


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_sha(kind, data):
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=()):
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers)


class Repo:
    def __init__(self, kind, rid, private):
        self.kind, self.id, self.private, self.gated, self.granted = kind, rid, private, False, set()
        self.created = self.modified = now()
        self.branches, self.tags, self.prs, self.commits = {}, {}, {}, {}

    def resolve(self, rev):
        for table, pre in ((self.branches, "refs/heads/"), (self.tags, "refs/tags/"), (self.prs, "")):
            for name in (rev, rev[len(pre) :] if pre and rev.startswith(pre) else rev):
                if name in table:
                    return table[name]
        if rev in self.commits:
            return rev
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def commit(self, branch, files, title, message, user, parent, table=None):
        body = json.dumps([sorted((p, f["oid"]) for p, f in files.items()), title, message, parent, time.time_ns()])
        cid = git_sha("commit", body.encode())
        self.commits[cid] = dict(
            id=cid, title=title, message=message, date=now(), files=files, parent=parent, user=user
        )
        (self.branches if table is None else table)[branch] = cid
        self.modified = now()
        return cid


class Hub:
    def __init__(self, root, xet):
        self.root, self.xet, self.repos, self.lock, self.log = root, xet, {}, threading.RLock(), []
        for d in ("lfs", "cas"):
            os.makedirs(os.path.join(root, d), exist_ok=True)
        self.xet_of, self.files = {}, {}  # sha256 -> (xet file hash, size); xet file hash -> segments
        self.drops = []  # one entry for each coming download of a large file: bytes it sends before the line breaks

    def lfs(self, oid):
        return os.path.join(self.root, "lfs", oid)

    # ---- xet: a tiny CAS.  A shard lists files (xet hash, sha256, segments of xorbs); a xorb is a run of chunks
    @staticmethod
    def _hash(b):  # MerkleHash text form: four little-endian u64
        return "".join(f"{x:016x}" for x in struct.unpack("<4Q", b))

    def add_shard(self, b):
        o = 48  # after the header: 48-byte records up to an all-ones file hash
        while o + 48 <= len(b) and b[o : o + 32] != b"\xff" * 32:
            fh, (flags, n) = self._hash(b[o : o + 32]), struct.unpack("<II", b[o + 32 : o + 40])
            segs = [
                (self._hash(b[x : x + 32]), *struct.unpack("<III", b[x + 36 : x + 48]))
                for x in range(o + 48, o + 48 + 48 * n, 48)
            ]
            for xorb, _, _, end in segs:
                if len(self.chunk_offsets(xorb)) <= end:
                    raise HubError(400, "shard names chunks that its xorb lacks")
            o += 48 + 48 * n * (2 if flags >> 31 else 1)
            self.files[fh] = segs
            if flags >> 30 & 1:
                self.xet_of[self._hash(b[o : o + 32])] = (fh, sum(s[1] for s in segs))
                o += 48

    def chunk_offsets(self, xorb):  # byte offset of every chunk, and the end
        with open(os.path.join(self.root, "cas", os.path.basename(xorb)), "rb") as f:
            b = f.read()
        o, out = 0, [0]
        while o + 8 <= len(b) and b[o : o + 7] != b"XETBLOB":
            o += 8 + int.from_bytes(b[o + 1 : o + 4], "little")
            out.append(o)
        return out

    def reconstruction(self, fh, first, last, cdn):
        pos, terms, fetch, skip = 0, [], {}, None
        for xorb, size, c0, c1 in self.files[fh]:
            if pos + size > first and pos <= last:
                skip = first - pos if skip is None else skip
                terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": c0, "end": c1}})
                lo, hi = fetch.get(xorb, (c0, c1))  # one fetch per xorb: overlapping ranges make hf_xet panic
                fetch[xorb] = min(lo, c0), max(hi, c1)
            pos += size
        info = {}
        for xorb, (lo, hi) in fetch.items():
            off = self.chunk_offsets(xorb)
            info[xorb] = [
                {
                    "range": {"start": lo, "end": hi},
                    "url": f"{cdn}/xorb-store/{xorb}",
                    "url_range": {"start": off[lo], "end": off[hi] - 1},
                }
            ]
        return pos, {"offset_into_first_range": skip or 0, "terms": terms, "fetch_info": info}

    def have(self, oid):
        return os.path.exists(self.lfs(oid)) or oid in self.xet_of

    def size(self, oid):
        return self.xet_of[oid][1] if oid in self.xet_of else os.path.getsize(self.lfs(oid))

    def materialise(self, oid, base):  # a xet file asked for over plain HTTP: rebuild it once, with hf_xet itself
        if not os.path.exists(self.lfs(oid)):
            import hf_xet

            tmp = self.lfs(oid) + f".{threading.get_ident()}.tmp"
            with hf_xet.XetSession().new_file_download_group(
                endpoint=base, token="xet-read", token_expiry_unix_secs=int(time.time()) + 3600
            ) as g:
                g.start_download_file(hf_xet.XetFileInfo(*self.xet_of[oid]), tmp)
            with open(tmp, "rb") as f:
                assert hashlib.file_digest(f, "sha256").hexdigest() == oid
            os.replace(tmp, self.lfs(oid))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "TestHub/1"
    hub: Hub = None
    base = ""  # endpoint as the client knows it
    cdn = ""  # another origin spelling of the same port

    def log_message(self, *a):
        pass

    # ---- plumbing
    def send(self, status, body=b"", ctype="application/json", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        for k, v in dict(headers).items():
            self.send_header(k, v)
        self.send_header("Content-Type", ctype)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path, headers):
        size, rng = os.path.getsize(path), self.headers.get("Range")
        a, b, status = 0, size - 1, 200
        if rng and (m := re.match(r"bytes=(\d+)-(\d*)$", rng)):
            a, b = int(m[1]), min(int(m[2] or size - 1), size - 1)
            if a >= size:
                return self.send(416, b"", headers={"Content-Range": f"bytes */{size}"})
            status = 206
            headers = {**headers, "Content-Range": f"bytes {a}-{b}/{size}"}
        self.status = status
        self.send_response(status)
        for k, v in {
            **headers,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(b - a + 1),
        }.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            left = b - a + 1
            broken = self.seg[0] in ("lfs-store", "xorb-store") and bool(self.hub.drops)
            if broken:
                left = min(left, self.hub.drops.pop(0))
            with open(path, "rb") as f:
                f.seek(a)
                while left and (d := f.read(min(left, 1 << 20))):
                    self.wfile.write(d)
                    left -= len(d)
            if broken:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def drain(self):  # always read the body: an error answer must not desync a kept connection
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = []
            while n := int(self.rfile.readline().split(b";")[0], 16):
                out.append(self.rfile.read(n))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(out)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self):
        return json.loads(self.body) if self.body else {}

    def handle_any(self):
        self.status, self.body = 0, self.drain()
        u = urlsplit(self.path)
        self.q = parse_qs(u.query)
        self.seg = [unquote(s) for s in u.path.split("/")[1:]]
        try:
            auth = self.headers.get("Authorization", "")
            self.token = auth[7:] if auth.startswith("Bearer ") else None
            if self.hub.xet and self.seg[0] in ("v1", "v2"):
                return self.cas()
            if self.token and self.token not in TOKENS:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user, self.role = TOKENS.get(self.token, (None, None))
            self.route()
        except HubError as e:
            self.send(
                e.status,
                {"error": e.message},
                headers={"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {}), **e.headers},
            )
        except (BrokenPipeError, ConnectionResetError):
            pass
        except Exception as e:
            import traceback

            traceback.print_exc()
            self.send(500, {"error": repr(e)})
        finally:
            self.hub.log.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ---- permissions
    def repo(self, kind, rid, write=False, content=False):
        r = self.hub.repos.get((kind, rid))
        owner = rid.split("/")[0]
        if r is None or (r.private and self.user != owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and (self.user != owner or self.role != "write"):
            if not self.user:
                raise HubError(401, "Invalid username or password.")
            raise HubError(
                403,
                "Forbidden: you must use a write token"
                if self.user == owner
                else f"You don't have the rights to write to {rid}",
            )
        if content and r.gated and self.user != owner and self.user not in r.granted:
            if not self.user:
                raise HubError(
                    401,
                    f"Access to {kind} {rid} is restricted. You must have access to it and be "
                    "authenticated to access it. Please log in.",
                    "GatedRepo",
                )
            raise HubError(
                403,
                f"Access to {kind} {rid} is restricted and you are not in the authorized list. "
                f"Visit {self.base}/{rid} to ask for access.",
                "GatedRepo",
            )
        return r

    # ---- routing
    def route(self):
        s = self.seg
        if s[:2] == ["api", "whoami-v2"]:
            if not self.user:
                raise HubError(401, "Invalid username or password.")
            return self.send(
                200,
                {
                    "type": "user",
                    "id": self.user,
                    "name": self.user,
                    "fullname": self.user,
                    "email": None,
                    "isPro": False,
                    "orgs": [],
                    "canPay": False,
                    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": self.role}},
                },
            )
        if s[:2] == ["api", "validate-yaml"]:
            return self.send(200, {"errors": [], "warnings": []})
        if s == ["api", "repos", "create"]:
            return self.create_repo()
        if s[0] == "api" and s[1] in ("models", "datasets"):
            kind = s[1][:-1]
            sub = {
                "revision",
                "tree",
                "preupload",
                "commit",
                "commits",
                "branch",
                "tag",
                "paths-info",
                "settings",
                "xet-read-token",
                "xet-write-token",
            }
            n = 4 if len(s) > 3 and s[3] not in sub else 3
            return self.repo_api(kind, "/".join(s[2:n]), s[n] if len(s) > n else None, s[n + 1 :])
        if s[0] == "lfs-store":
            return self.lfs_store(s[1])
        if s[0] == "xorb-store":
            return self.send_file(os.path.join(self.hub.root, "cas", os.path.basename(s[1])), {})
        kind, t = ("dataset", s[1:]) if s[0] == "datasets" else ("model", s)
        for i in (1, 2):
            if len(t) > i and t[i] in ("resolve", "raw"):
                return self.resolve(kind, "/".join(t[:i]), t[i + 1], "/".join(t[i + 2 :]))
            if len(t) > i and t[i - 1].endswith(".git") and t[i : i + 4] == ["info", "lfs", "objects", "batch"]:
                return self.lfs_batch(kind, "/".join(t[:i])[:-4])
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def create_repo(self):
        d = self.json()
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        kind, owner = d.get("type") or "model", d.get("organization") or self.user
        rid = f"{owner}/{d['name']}"
        pre = "" if kind == "model" else kind + "s/"
        if owner != self.user or self.role != "write":
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        with self.hub.lock:
            url = f"{self.base}/{pre}{rid}"
            if (kind, rid) in self.hub.repos:
                return self.send(409, {"error": f"You already created this {kind} repo", "url": url, "name": rid})
            private = bool(d.get("private")) or d.get("visibility") == "private"
            r = self.hub.repos[(kind, rid)] = Repo(kind, rid, private)
            att = "".join(f"*{e} filter=lfs diff=lfs merge=lfs -text\n" for e in LFS_EXT).encode()
            r.commit("main", {".gitattributes": self.regular(att)}, "initial commit", "", self.user, None)
        self.send(200, {"url": url, "name": rid, "id": rid, "private": private})

    def regular(self, data):
        oid = git_sha("blob", data)
        p = os.path.join(self.hub.root, "lfs", "git-" + oid)
        if not os.path.exists(p):
            with open(p + f".{threading.get_ident()}", "wb") as f:
                f.write(data)
            os.replace(f.name, p)
        return {"oid": oid, "size": len(data)}

    # ---- repo metadata
    def info(self, r, sha):
        files = r.commits[sha]["files"]
        blobs = "blobs" in self.q
        card = {}
        if "README.md" in files:
            t = open(self.path_of(files["README.md"]), encoding="utf-8").read()
            if t.startswith("---") and "library_name:" in t:
                card["library_name"] = re.search(r"library_name:\s*(\S+)", t)[1]
        cfg = {}
        if "config.json" in files:
            try:
                cfg = json.load(open(self.path_of(files["config.json"]), encoding="utf-8"))
            except ValueError:
                pass
        d = {
            "_id": git_sha("id", r.id.encode())[:24],
            "id": r.id,
            "modelId": r.id,
            "author": r.id.split("/")[0],
            "sha": sha,
            "lastModified": r.modified,
            "createdAt": r.created,
            "private": r.private,
            "gated": r.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": card,
            "usedStorage": sum(f["size"] for f in files.values()),
            "siblings": [
                {
                    "rfilename": p,
                    **(
                        {
                            "size": f["size"],
                            "blobId": f["oid"],
                            **(
                                {"lfs": {"sha256": f["lfs"], "size": f["size"], "pointerSize": 134}}
                                if f.get("lfs")
                                else {}
                            ),
                        }
                        if blobs
                        else {}
                    ),
                }
                for p, f in sorted(files.items())
            ],
        }
        if r.kind == "model":
            d["config"] = {k: cfg[k] for k in ("architectures", "model_type", "auto_map") if k in cfg}
            d["library_name"] = card.get("library_name")
        return d

    def entry(self, p, f):
        e = {"type": "file", "oid": f["oid"], "size": f["size"], "path": p}
        if f.get("lfs"):
            e["lfs"] = {"oid": f["lfs"], "size": f["size"], "pointerSize": 134}
            if self.hub.xet and f["lfs"] in self.hub.xet_of:
                e["xetHash"] = self.hub.xet_of[f["lfs"]][0]
        return e

    def tree(self, files, at, recursive):
        out, dirs = [], set()
        at = at.strip("/") + "/" if at.strip("/") else ""
        for p, f in sorted(files.items()):
            if not p.startswith(at):
                continue
            rest = p[len(at) :].split("/")
            for i in range(1, len(rest) if recursive else min(2, len(rest))):
                dirs.add(at + "/".join(rest[:i]))
            if recursive or len(rest) == 1:
                out.append(self.entry(p, f))
        return [
            {"type": "directory", "oid": git_sha("tree", d.encode()), "size": 0, "path": d} for d in sorted(dirs)
        ] + out

    def repo_api(self, kind, rid, verb, rest):
        m = self.command
        if verb in (None, "revision") and m in ("GET", "HEAD"):
            r = self.repo(kind, rid)
            return self.send(200, self.info(r, r.resolve(rest[0] if rest else "main")))
        if verb == "settings":
            r, d = self.repo(kind, rid, write=True), self.json()
            r.gated = d.get("gated", r.gated)
            r.private = d.get("visibility", "private" if r.private else "public") == "private"
            return self.send(200, {"private": r.private, "gated": r.gated})
        if verb in ("xet-read-token", "xet-write-token"):
            self.repo(kind, rid, write=verb == "xet-write-token", content=True)
            if not self.hub.xet:
                raise HubError(404, "Xet is off on this server")
            exp, tok = int(time.time()) + 3600, verb[:-6]
            return self.send(
                200,
                {"casUrl": self.base, "accessToken": tok, "exp": exp},
                headers={"X-Xet-Cas-Url": self.base, "X-Xet-Access-Token": tok, "X-Xet-Token-Expiration": str(exp)},
            )
        if verb in ("branch", "tag") and m == "POST":
            r, d = self.repo(kind, rid, write=True), self.json()
            table, name = (r.branches, rest[0]) if verb == "branch" else (r.tags, d["tag"])
            if name in table:
                raise HubError(409, f"Reference already exists: {name}")
            table[name] = r.resolve((d.get("startingPoint") or "main") if verb == "branch" else rest[0])
            return self.send(201, {})
        if verb == "commits":
            r, out = self.repo(kind, rid), []
            c = r.resolve(rest[0])
            while c:
                k = r.commits[c]
                out.append(
                    {
                        "id": c,
                        "title": k["title"],
                        "message": k["message"],
                        "date": k["date"],
                        "authors": [{"user": k["user"], "avatar": ""}],
                    }
                )
                c = k["parent"]
            return self.send(200, out)
        if verb == "tree":
            r = self.repo(kind, rid)
            files, at = r.commits[r.resolve(rest[0])]["files"], "/".join(rest[1:])
            out = self.tree(files, at, self.q.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if at and not out:
                raise HubError(404, f'{at} does not exist on "{rest[0]}"', "EntryNotFound")
            return self.send(200, out)
        if verb == "paths-info":
            r = self.repo(kind, rid)
            b = self.body.decode()
            d = json.loads(b) if b.startswith("{") else parse_qs(b)
            files = r.commits[r.resolve(rest[0])]["files"]
            every = {e["path"]: e for e in self.tree(files, "", True)}
            return self.send(200, [every[p.strip("/")] for p in d.get("paths", []) if p.strip("/") in every])
        if verb == "preupload":
            r, d = self.repo(kind, rid, write=True), self.json()
            files = r.commits[r.resolve(rest[0])]["files"]
            out = []
            for f in d["files"]:
                old = files.get(f["path"])
                big = f["path"].lower().endswith(tuple(LFS_EXT)) or f["size"] > REGULAR_MAX
                out.append(
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if big else "regular",
                        "shouldIgnore": False,
                        "oid": (old.get("lfs") or old["oid"]) if old else None,
                    }
                )
            return self.send(200, {"files": out})
        if verb == "commit":
            return self.commit(kind, rid, rest[0])
        raise HubError(404, "Not implemented here: " + self.path)

    def commit(self, kind, rid, rev):
        with self.hub.lock:
            r = self.repo(kind, rid, write=True)
            table = r.prs if rev.startswith("refs/pr/") else r.branches
            if rev not in table:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            head, files = {}, dict(r.commits[table[rev]]["files"])
            for line in self.body.splitlines():
                if not line.strip():
                    continue
                d = json.loads(line)
                k, v = d["key"], d["value"]
                if k == "header":
                    head = v
                elif k == "file":
                    files[v["path"]] = self.regular(base64.b64decode(v["content"]))
                elif k == "lfsFile":
                    if not self.hub.have(v["oid"]):
                        raise HubError(
                            400, f"LFS pointer pointed to a file that does not exist: {v['path']} {v['oid']}"
                        )
                    size = self.hub.size(v["oid"])
                    ptr = f"version https://git-lfs.github.com/spec/v1\noid sha256:{v['oid']}\nsize {size}\n".encode()
                    files[v["path"]] = {"oid": git_sha("blob", ptr), "size": size, "lfs": v["oid"]}
                elif k == "deletedFile":
                    if files.pop(v["path"], None) is None:
                        raise HubError(404, f"{v['path']} does not exist", "EntryNotFound")
                else:
                    raise HubError(400, f"Not implemented here: {k}")
            parent = head.get("parentCommit")
            if parent and r.resolve(parent) != table[rev]:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            out = {}
            if self.q.get("create_pr") == ["1"]:
                n = len(r.prs) + 1
                cid = r.commit(
                    f"refs/pr/{n}",
                    files,
                    head.get("summary", ""),
                    head.get("description", ""),
                    self.user,
                    table[rev],
                    r.prs,
                )
                out["pullRequestUrl"] = f"{self.base}/{'' if kind == 'model' else kind + 's/'}{rid}/discussions/{n}"
            else:
                cid = r.commit(
                    rev, files, head.get("summary", ""), head.get("description", ""), self.user, table[rev], table
                )
        self.send(
            200,
            {
                "success": True,
                "commitOid": cid,
                "hookOutput": "",
                "commitUrl": f"{self.base}/{'' if kind == 'model' else kind + 's/'}{rid}/commit/{cid}",
                **out,
            },
        )

    # ---- xet CAS over HTTP (the v2 calls answer 404, so the client falls back to v1)
    def cas(self):
        s, m = self.seg, self.command
        if self.token not in ("xet-read", "xet-write"):
            raise HubError(401, "no xet token")
        if m == "POST" and self.token != "xet-write" and s[1] != "telemetry":
            raise HubError(403, "read-only xet token")
        if s[:3] == ["v1", "xorbs", "default"] and m == "POST":
            p = os.path.join(self.hub.root, "cas", os.path.basename(s[3]))
            new = not os.path.exists(p)
            with open(p + f".{threading.get_ident()}", "wb") as f:
                f.write(self.body)
            os.replace(f.name, p)
            return self.send(200, {"was_inserted": new})
        if s == ["v1", "shards"] and m == "POST":
            with self.hub.lock:
                self.hub.add_shard(self.body)
            return self.send(200, {"result": 1})
        if s[:2] == ["v1", "reconstructions"] and len(s) == 3 and s[2] in self.hub.files:
            r = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", "bytes=0-" + "9" * 15))
            total, out = self.hub.reconstruction(s[2], int(r[1]), int(r[2]), self.cdn)
            return self.send(416 if int(r[1]) >= total else 200, out)
        if s == ["v1", "telemetry"]:
            return self.send(200, {})
        raise HubError(404, "not here")

    # ---- files
    def path_of(self, f):
        return self.hub.lfs(f["lfs"]) if f.get("lfs") else self.hub.lfs("git-" + f["oid"])

    def resolve(self, kind, rid, rev, path):
        r = self.repo(kind, rid, content=True)
        sha = r.resolve(rev)
        f = r.commits[sha]["files"].get(path)
        h = {"X-Repo-Commit": sha}
        if f is None:
            raise HubError(404, "Entry not found", "EntryNotFound", h)
        if f.get("lfs"):
            h |= {
                "X-Linked-Etag": f'"{f["lfs"]}"',
                "X-Linked-Size": str(f["size"]),
                "ETag": f'"{f["oid"]}"',
                "Location": f"{self.cdn}/lfs-store/{f['lfs']}?sig=1",
            }
            if self.hub.xet and f["lfs"] in self.hub.xet_of:
                h |= {
                    "X-Xet-Hash": self.hub.xet_of[f["lfs"]][0],
                    "Link": f'<{self.base}/api/{kind}s/{rid}/xet-read-token/{sha}>; rel="xet-auth"',
                }
            return self.send(302, b"", "text/plain", h)
        self.send_file(self.path_of(f), {**h, "ETag": f'"{f["oid"]}"'})

    def lfs_batch(self, kind, rid):
        d = self.json()
        self.repo(kind, rid, write=d["operation"] == "upload", content=True)
        objs = []
        for o in d["objects"]:
            e = {"oid": o["oid"], "size": o["size"], "authenticated": True}
            if d["operation"] == "download":
                e["actions"] = {"download": {"href": f"{self.cdn}/lfs-store/{o['oid']}"}}
            elif not self.hub.have(o["oid"]):
                e["actions"] = {
                    "upload": {"href": f"{self.cdn}/lfs-store/{o['oid']}"},
                    "verify": {"href": f"{self.base}/lfs-store/{o['oid']}"},
                }
            objs.append(e)
        self.send(200, {"transfer": "basic", "objects": objs}, "application/vnd.git-lfs+json")

    def lfs_store(self, oid):
        if not re.match(r"^[0-9a-f]{64}$", oid):
            raise HubError(404, "no such object")
        if self.command == "PUT":
            data = self.body
            if hashlib.sha256(data).hexdigest() != oid:
                raise HubError(400, "sha256 mismatch")
            tmp = self.hub.lfs(oid) + f".{threading.get_ident()}"
            with open(tmp, "wb") as f:
                f.write(data)
            os.replace(tmp, self.hub.lfs(oid))
            return self.send(200)
        if self.command == "POST":
            d = self.json()
            ok = os.path.exists(self.hub.lfs(oid)) and os.path.getsize(self.hub.lfs(oid)) == d["size"]
            return self.send(200 if ok else 404, {})
        if not self.hub.have(oid):
            raise HubError(404, "no such object")
        self.hub.materialise(oid, self.base)
        self.send_file(self.hub.lfs(oid), {"ETag": f'"{oid}"'})


def serve(root, xet=False):
    """Start in a thread; returns (server, endpoint, hub). server.shutdown() to stop."""

    class H(Handler):
        pass

    srv = ThreadingHTTPServer(("127.0.0.1", 0), H)
    srv.daemon_threads = True
    H.hub = Hub(root, xet)
    H.base, H.cdn = f"http://127.0.0.1:{srv.server_port}", f"http://localhost:{srv.server_port}"
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    return srv, H.base, H.hub
