"""A fake of Ray's job server for jobs that a test defines; its client is Ray's own."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, web


class JobServer:
    """A server on loopback; `with` starts and stops it."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.tails: dict[str, list[tuple[str, bool]]] = {}
        """For each connection that follows a log: the text it sends, and whether it then breaks."""
        self.submitted: list[dict[str, Any]] = []
        """Request bodies of the submitted jobs."""
        self.uploads = 0
        self.on_tail: Callable[[str], None] = lambda job: None
        self.log_of_submitted = ""
        """Log of the jobs that are submitted."""
        self.broken = 0
        """Number of next responses that are the error of a starting server."""
        self.silent_s = 0.0
        """Seconds without data before a log connection ends."""
        self.address = ""

    def add(self, job: str, status: str, log: str = "", **details: Any) -> None:
        """Add a job."""
        self.logs[job] = log
        self.jobs[job] = {
            "type": "SUBMISSION",
            "submission_id": job,
            "entrypoint": "python -m ray_jobs.train",
            "status": status,
            **details,
        }

    def __enter__(self) -> "JobServer":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._authenticate, self._fail], client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/{protocol}/{name}", self._no_package),
                web.put("/api/packages/{protocol}/{name}", self._package),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._job),
                web.delete("/api/jobs/{id}", self._delete),
                web.post("/api/jobs/{id}/stop", self._stop_job),
                web.get("/api/jobs/{id}/logs", self._log),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = "http://{}:{}".format(*runner.addresses[0][:2])
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if self.token and not given:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token and given != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    @web.middleware
    async def _fail(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.broken and not request.path.startswith("/api/version"):
            self.broken -= 1
            return web.Response(status=503, text="No head yet")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

    async def _no_package(self, request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _package(self, request: web.Request) -> web.Response:
        self.uploads += len(await request.read())
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.submitted.append(body)
        job = body.get("submission_id") or f"job_{len(self.submitted)}"
        if job in self.jobs:
            text = f"Traceback (most recent call last):\nValueError: Job {job} already exists."
            return web.Response(status=500, text=text)
        kept = {name: body.get(name) for name in ("entrypoint", "metadata", "runtime_env")}
        self.add(job, "SUCCEEDED", self.log_of_submitted, driver_exit_code=0, **kept)
        return web.json_response({"submission_id": job, "job_id": job})

    async def _job(self, request: web.Request) -> web.Response:
        job = request.match_info["id"]
        if job not in self.jobs:
            return web.Response(status=404, text=f"Job {job} does not exist")
        return web.json_response(self.jobs[job])

    async def _delete(self, request: web.Request) -> web.Response:
        del self.jobs[request.match_info["id"]]
        return web.json_response({"deleted": True})

    async def _stop_job(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs[request.match_info["id"]]})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        job = request.match_info["id"]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text, breaks = self.tails[job].pop(0)
        for line in text.splitlines(keepends=True):
            await socket.send_str(line)
        self.on_tail(job)
        await asyncio.sleep(self.silent_s)
        if breaks:
            assert request.transport is not None
            request.transport.abort()
        else:
            await socket.close(code=WSCloseCode.OK)
        return socket
