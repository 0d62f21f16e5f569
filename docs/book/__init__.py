"""The builder of docs/read.html: prose and figures by the sections of chapter 3."""
