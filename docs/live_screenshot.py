"""Makes docs/live.png: the live page over a tiny model on this machine, under mixed load."""

import shutil
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.ir.model import load_model, read_config
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.init_model import Blueprint, init_model
from mnemoc.runtime.request import Origin, Promise
from mnemoc.runtime.server import bind, create_app
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
LOAD = ((60_000, 40, "contract-review-17"), (24_000, 40, "codebase-question-4"))
SHORT = (("chat", 300, 8), ("chat", 900, 60), ("summary", 2500, 50), ("chat", 120, 70))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, plan = Path(folder) / "tiny-llama", Path(folder) / "plan"
        spec = load_model("tiny-llama")
        blueprint = Blueprint(
            read_config("tiny-llama"), spec.tensors(), spec.dtype, spec.vocab, spec.bos, spec.eos
        )
        init_model(blueprint, model, seed=1, max_shard_bytes=2**30)
        workload = Workload(context=64_000, ttft_s=120.0, tbt_s=0.25, concurrency=2)
        planned = pipeline.plan(str(model), "local", workload, gpus=2, pinned={"kvp": 2})
        pipeline.emit(planned, plan)
        with Engine.start(plan, model) as engine:
            photograph(engine)


def photograph(engine: Engine) -> None:
    with bind("127.0.0.1", 0) as listener, sync_playwright() as driver:
        config = uvicorn.Config(create_app(engine, None), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 1080, "height": 1130}, color_scheme="light")
        tab.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
        for i, (prompt, tokens, name) in enumerate(LOAD):
            ask(engine, prompt, tokens, name, i)
        for i in range(6):
            name, prompt, tokens = SHORT[i % len(SHORT)]
            ask(engine, prompt + i, tokens, f"{name}-{100 + i}", 10 + i)
            time.sleep(1.0)
        time.sleep(3)
        tab.screenshot(path=HERE / "live.png")
        browser.close()
        server.should_exit = True
        thread.join()


def ask(engine: Engine, prompt: int, tokens: int, name: str, seed: int) -> None:
    ids = [(seed * 7919 + i * 31) % engine.vocab for i in range(prompt)]
    promise = Promise(ttft_s=3 + prompt / 200, tbt_s=2)
    request = Request(ids, tokens, Sampling(ignore_eos=True), promise=promise, origin=Origin(name))
    engine.submit(request, lambda event: None)


if __name__ == "__main__":
    main()
