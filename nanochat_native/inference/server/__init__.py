"""A server for one model: OpenAI's completions and chat API, and a chat page. It requires the extra `serve`.

    python -m nanochat_native.serve --checkpoint runs/mine

app has the routes; protocol reads requests and builds answers; worker runs the engine in its own thread; connection
closes connections whose client is too slow; metrics counts; page.html is the page, in one file.
"""
