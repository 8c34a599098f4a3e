"""A server of one model: OpenAI's completions and chat, and a page to talk to it. It needs the extra `serve`.

    python -m nanochat_native.serve --checkpoint runs/mine

__main__ starts it; connection closes what keeps it waiting; app answers; protocol knows OpenAI's requests and answers;
worker runs the engine in its own thread; metrics counts; page.html is the page, in one file.
"""
