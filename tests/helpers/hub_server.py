"""A Hugging Face Hub on loopback: the part of its HTTP API that pushing and loading a model takes, faults on demand.

Repositories live in memory. A commit is a map from path to content, so it is there whole or not at all, as on the Hub.
Large files go through LFS: uploaded by PUT, and served from another host name (localhost instead of 127.0.0.1), as the
Hub serves them from its CDN; a client must not send its token there, and `token_leaks` lists where one did.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt')


@dataclass(frozen=True)
class File:
    """Content of one file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub compares: the sha256 of an LFS file, the git blob id of any other."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return git_blob_id(self.content)


@dataclass
class Repo:
    """A repository: commits by id, and the branches and pull requests that point at them."""

    repo_type: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict] = field(default_factory=list)

    def commit(self, files: dict[str, File], ref: str, parent: str | None) -> str:
        text = json.dumps([parent, {path: file.oid for path, file in sorted(files.items())}, len(self.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.parents[sha], self.refs[ref] = files, parent, sha
        return sha

    def history(self, ref: str = 'main') -> list[str]:
        """Commit ids from the ref's newest to its oldest."""
        ids, sha = [], self.refs.get(ref)
        while sha is not None:
            ids.append(sha)
            sha = self.parents[sha]
        return ids

    def files(self, ref: str = 'main') -> dict[str, File]:
        return self.commits[self.refs.get(ref, ref)]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match. One of:

    status: reply with it, and do nothing.
    drop: close the connection 'before' the request is read, 'during' (half of its body read) or 'after' it was done.
    edit: reply with the edited body in place of the right one, under the right headers.
    cut: promise the whole body, send half of it, close the connection.
    trickle: seconds to wait after each byte of the body.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    edit: Callable[[bytes], bytes] | None = None
    cut: bool = False
    trickle: float = 0
    hits: int = 0


class HubServer:
    """The Hub at `url`, between `with` and its end.

    Args:
        tokens: Token to its role, 'write' or 'read'. All belong to the user `user`.
    """

    user = 'me'

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {})
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.token_leaks: list[str] = []
        self.lock = threading.RLock()

    def __enter__(self) -> 'HubServer':
        handler = type('Handler', (_Handler,), {'hub': self})
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # a client that has gone
        self.port = self._http.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        threading.Thread(target=self._http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_exc) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault(self, method: str, path: str, **kwargs) -> Fault:
        """Add a fault for requests of this method whose path the regular expression `path` finds."""
        made = Fault(method, path, **kwargs)
        self.faults.append(made)
        return made

    def model(self, repo_id: str) -> Repo:
        return self.repos['model', repo_id]

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        repo_type: str = 'model',
        private: bool = False,
    ) -> Repo:
        """Create a repository as the Hub does, with .gitattributes in its first commit, and a second with `files`."""
        repo = self.repos[repo_type, repo_id] = Repo(repo_type, private)
        first = repo.commit({'.gitattributes': File(b'*.safetensors filter=lfs\n', False)}, 'main', None)
        if files:
            added = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            repo.commit({**repo.files(), **added}, 'main', first)
            self.lfs.update({file.oid: file.content for file in added.values() if file.lfs})
        return repo


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _Reply(Exception):
    """What a handler answers with."""

    def __init__(self, status: int, body: bytes | dict | list = b'', headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {'Content-Type': 'application/octet-stream' if isinstance(body, bytes) else 'application/json'}
        self.headers.update(headers or {})


def _error(status: int, message: str, code: str | None = None, **body) -> _Reply:
    headers = {'X-Error-Message': message}
    if code:
        headers['X-Error-Code'] = code
    return _Reply(status, {'error': message, **body}, headers)


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_API = rf'/api/(?P<type>model|dataset|space)s/{_REPO}'
_ROUTES = [
    ('GET', r'/api/whoami-v2', 'whoami'),
    ('POST', r'/api/validate-yaml', 'validate_yaml'),
    ('POST', r'/api/repos/create', 'create'),
    ('GET', rf'{_API}(/revision/(?P<rev>[^/]+))?', 'info'),
    ('GET', rf'{_API}/refs', 'refs'),
    ('GET', rf'{_API}/tree/(?P<rev>[^/]+)', 'tree'),
    ('GET', rf'{_API}/discussions', 'discussions'),
    ('POST', rf'{_API}/branch/(?P<rev>[^/]+)', 'branch'),
    ('POST', rf'{_API}/preupload/(?P<rev>[^/]+)', 'preupload'),
    ('POST', rf'{_API}/commit/(?P<rev>[^/]+)', 'commit'),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', 'lfs_batch'),
    ('PUT', r'/lfs/upload/(?P<oid>[0-9a-f]{64})', 'lfs_upload'),
    ('POST', r'/lfs/verify', 'lfs_verify'),
    ('GET', rf'/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
    ('HEAD', rf'/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
    ('GET', r'/cdn/(?P<oid>[0-9a-f]{64})', 'cdn'),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    timeout = 30
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge its headers

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, parts.path))
            fault = next(
                (
                    f
                    for f in self.hub.faults
                    if f.hits < f.times and f.method == self.command and re.search(f.path, parts.path)
                ),
                None,
            )
            if fault is not None:
                fault.hits += 1
        if fault is not None and fault.drop in ('before', 'during'):
            length = int(self.headers.get('Content-Length') or 0)
            self.rfile.read(length // 2 if fault.drop == 'during' else 0)
            return self._close()
        self.body = self._read_body()
        if fault is not None and fault.status is not None:
            reply = _error(fault.status, HTTPStatus(fault.status).phrase)
            reply.headers.update(fault.headers)
        else:
            with self.hub.lock:
                try:
                    reply = self._route(parts.path)
                except _Reply as raised:
                    reply = raised
        if fault is not None and fault.drop == 'after':
            return self._close()
        body = fault.edit(reply.body) if fault is not None and fault.edit else reply.body
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if 'Content-Length' not in reply.headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            if fault is not None and fault.trickle:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(fault.trickle)
                return
            cut = fault is not None and fault.cut
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _route(self, path: str) -> _Reply:
        for method, pattern, name in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, f'_{name}')(**values)
        return _error(404, f'no route for {self.command} {path}')

    # Who asks

    def _role(self) -> str | None:
        header = self.headers.get('Authorization')
        if header is None:
            return None
        role = self.hub.tokens.get(header.removeprefix('Bearer '))
        if role is None:
            raise _error(401, 'Invalid credentials in Authorization header')
        return role

    def _require_write(self) -> None:
        role = self._role()
        if role is None:
            raise _error(401, 'Invalid username or password.')
        if role != 'write':
            raise _error(403, "You don't have the rights to do this with a read token")

    def _repo(self, repo: str, repo_type: str = 'model') -> Repo:
        found = self.hub.repos.get((repo_type, repo))
        if found is None or (found.private and self._role() is None):
            raise _error(404, 'Repository not found', 'RepoNotFound')
        return found

    def _sha(self, repo: Repo, rev: str) -> str:
        sha = repo.refs.get(rev) or (rev if rev in repo.commits else None)
        if sha is None:
            raise _error(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
        return sha

    # Accounts and repositories

    def _whoami(self) -> _Reply:
        if self._role() is None:
            raise _error(401, 'Invalid username or password.')
        return _Reply(200, {'type': 'user', 'name': self.hub.user, 'fullname': self.hub.user, 'orgs': []})

    def _validate_yaml(self) -> _Reply:
        content = json.loads(self.body)['content']
        match = re.match(r'\s*---\n(.*?)\n---\s*(\n|$)', content, re.DOTALL)
        if match is None:
            return _Reply(200, {'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]})
        errors = []
        if not re.search(r'^license: \S+$', match.group(1), re.MULTILINE):
            errors.append({'message': '"license" is required'})
        return _Reply(400 if errors else 200, {'errors': errors, 'warnings': []})

    def _create(self) -> _Reply:
        self._require_write()
        wanted = json.loads(self.body)
        owner = wanted.get('organization') or self.hub.user
        if owner != self.hub.user:
            raise _error(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id, repo_type = f'{owner}/{wanted["name"]}', wanted.get('type') or 'model'
        url = f'{self.hub.url}/{repo_id}'
        if any(known == repo_id for _, known in self.hub.repos):
            raise _error(409, f'You already created this {repo_type} repo', url=url)
        private = bool(wanted.get('private')) or wanted.get('visibility') == 'private'
        self.hub.add_repo(repo_id, repo_type=repo_type, private=private)
        return _Reply(200, {'url': url, 'name': repo_id, 'id': repo_id})

    def _info(self, repo: str, type: str, rev: str = 'main') -> _Reply:
        found = self._repo(repo, type)
        sha = self._sha(found, rev)
        siblings = []
        for path, file in found.commits[sha].items():
            sibling = {'rfilename': path}
            if 'blobs' in self.query:
                sibling.update(size=len(file.content), blobId=git_blob_id(file.content))
                if file.lfs:
                    sibling['lfs'] = {'sha256': file.oid, 'size': len(file.content), 'pointerSize': 134}
            siblings.append(sibling)
        return _Reply(
            200,
            {
                '_id': sha[:24],
                'id': repo,
                'modelId': repo,
                'sha': sha,
                'private': found.private,
                'siblings': siblings,
                'tags': [],
                'downloads': 0,
                'likes': 0,
                'createdAt': '2026-01-01T00:00:00.000Z',
            },
        )

    def _tree(self, repo: str, type: str, rev: str) -> _Reply:
        found = self._repo(repo, type)
        entries = []
        for path, file in found.commits[self._sha(found, rev)].items():
            entry = {'type': 'file', 'path': path, 'size': len(file.content), 'oid': git_blob_id(file.content)}
            if file.lfs:
                entry['lfs'] = {'oid': file.oid, 'size': len(file.content), 'pointerSize': 134}
            entries.append(entry)
        return _Reply(200, entries)

    def _refs(self, repo: str, type: str) -> _Reply:
        found = self._repo(repo, type)
        branches = [
            {'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': sha}
            for name, sha in found.refs.items()
            if not name.startswith('refs/')
        ]
        return _Reply(200, {'branches': branches, 'converts': [], 'tags': [], 'pullRequests': []})

    def _branch(self, repo: str, type: str, rev: str) -> _Reply:
        self._require_write()
        found = self._repo(repo, type)
        if rev in found.refs:
            raise _error(409, f'Reference already exists: refs/heads/{rev}')
        start = (json.loads(self.body) if self.body else {}).get('startingPoint', 'main')
        found.refs[rev] = self._sha(found, start)
        return _Reply(200, {})

    def _discussions(self, repo: str, type: str) -> _Reply:
        found = self._repo(repo, type)
        listed = [] if int(self.query.get('p', ['0'])[0]) else found.pull_requests
        return _Reply(
            200,
            {
                'discussions': listed,
                'count': len(found.pull_requests),
                'start': 0,
                'numClosedDiscussions': 0,
            },
        )

    # Uploading

    def _preupload(self, repo: str, type: str, rev: str) -> _Reply:
        self._require_write()
        found = self._repo(repo, type)
        known = found.commits[self._sha(found, rev)]
        files = []
        for wanted in json.loads(self.body)['files']:
            path = wanted['path']
            mode = 'lfs' if path.endswith(LFS_SUFFIXES) or wanted['size'] > 10_000_000 else 'regular'
            answer = {'path': path, 'uploadMode': mode, 'shouldIgnore': False}
            if path in known:
                answer['oid'] = known[path].oid
            files.append(answer)
        return _Reply(200, {'files': files, 'commitOid': self._sha(found, rev)})

    def _lfs_batch(self, repo: str) -> _Reply:
        self._require_write()
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            answer = {'oid': wanted['oid'], 'size': wanted['size']}
            if wanted['oid'] not in self.hub.lfs:
                answer['actions'] = {
                    'upload': {'href': f'http://localhost:{self.hub.port}/lfs/upload/{wanted["oid"]}'},
                    'verify': {'href': f'{self.hub.url}/lfs/verify'},
                }
            objects.append(answer)
        return _Reply(200, {'transfer': 'basic', 'objects': objects})

    def _lfs_upload(self, oid: str) -> _Reply:
        self._note_leak()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _error(400, 'the content is not what its oid says')
        self.hub.lfs[oid] = self.body
        return _Reply(200)

    def _lfs_verify(self) -> _Reply:
        wanted = json.loads(self.body)
        if len(self.hub.lfs.get(wanted['oid'], b'')) != wanted['size']:
            raise _error(404, 'object not found')
        return _Reply(200, {})

    def _commit(self, repo: str, type: str, rev: str) -> _Reply:
        self._require_write()
        found = self._repo(repo, type)
        head = self._sha(found, rev)
        files = dict(found.commits[head])
        title = ''
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item['key'], item['value']
            if key == 'header':
                title = value['summary']
                if value.get('parentCommit', head) != head:
                    raise _error(412, 'A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                files[value['path']] = File(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.lfs:
                    raise _error(400, f'{value["path"]}: no LFS object {value["oid"]} was uploaded')
                files[value['path']] = File(self.hub.lfs[value['oid']], True)
            else:
                raise _error(400, f'unknown operation {key}')
        answer = {'success': True}
        if self.query.get('create_pr') == ['1']:
            number = len(found.pull_requests) + 1
            found.pull_requests.insert(
                0,
                {
                    'num': number,
                    'title': title,
                    'status': 'open',
                    'isPullRequest': True,
                    'author': {'name': self.hub.user},
                    'repo': {'name': repo, 'type': type},
                    'createdAt': '2026-01-01T00:00:00.000Z',
                },
            )
            rev = f'refs/pr/{number}'
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo}/discussions/{number}'
        sha = found.commit(files, rev, head)
        answer.update(commitOid=sha, commitUrl=f'{self.hub.url}/{repo}/commit/{sha}')
        return _Reply(200, answer)

    # Downloading

    def _resolve(self, repo: str, rev: str, path: str) -> _Reply:
        found = self._repo(repo)
        sha = self._sha(found, rev)
        file = found.commits[sha].get(path)
        if file is None:
            reply = _error(404, 'Entry not found', 'EntryNotFound')
            reply.headers['X-Repo-Commit'] = sha
            raise reply
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{file.oid}"'}
        if file.lfs:
            headers.update(
                {
                    'X-Linked-ETag': f'"{file.oid}"',
                    'X-Linked-Size': str(len(file.content)),
                    'Location': f'http://localhost:{self.hub.port}/cdn/{file.oid}',
                }
            )
            return _Reply(302, b'', headers)
        return self._content(file.content, headers)

    def _cdn(self, oid: str) -> _Reply:
        self._note_leak()
        if oid not in self.hub.lfs:
            raise _error(404, 'no such object')
        return self._content(self.hub.lfs[oid], {'ETag': f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> _Reply:
        if match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')):
            start = int(match.group(1))
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            return _Reply(206, content[start:], headers)
        if self.command == 'HEAD':
            headers['Content-Length'] = str(len(content))
        return _Reply(200, content, headers)

    def _note_leak(self) -> None:
        if self.headers.get('Authorization') is not None:
            self.hub.token_leaks.append(f'{self.command} {self.path}')
