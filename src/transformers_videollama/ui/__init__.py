"""What `videollama ui` shows: a web page on which people upload a video or a picture and talk about it.

`page` lays it out, `events` is what happens at each click, `visitors` keeps apart the people who have it open,
`pictures` shows what the model is given, `answering` streams answers out of the one model, `examples` renders clips to
click on, `server` is the process. Only `page`, `events` and `server` know Gradio.
"""
