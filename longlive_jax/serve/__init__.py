"""The studio: a web page that directs a video while it is made (`longlive serve`, docs/serve.md).

`studio` is the thread that runs a session, `room` the browsers around it, `lobby` who gets one, `protocol`
what goes over the socket, `security` who may talk at all, `app` the routes, `static` the page. `settings`
holds every limit.
"""
