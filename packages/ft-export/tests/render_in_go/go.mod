module render_in_go

go 1.24
