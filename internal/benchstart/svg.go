package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"slices"

	"github.com/headstart-oci/headstart/internal/linksim"
)

// Sizes of the plot, in pixels.
const (
	plotWidth  = 900
	plotLabel  = 250 // left of the bars
	plotBar    = 14
	plotGap    = 4
	plotTitle  = 34
	plotMargin = 16
	plotValue  = 90 // right of the longest bar
)

// colours of the modes, in their order; they differ in lightness too.
var colours = map[string]string{"pull": "#9aa0a6", "lazy": "#7fb3d5", "fuse": "#a3d9a5", "fuse-prefetch": "#26a269", "prefetch": "#1a5fb4", "nydusd": "#f0c48a", "nydusd-prefetch": "#c64600"}

// plot returns an SVG with one panel for each workload and link: a bar of the time to ready for each mode.
func plot(all []result) []byte {
	type panel struct {
		head string
		rows []result
	}
	var panels []panel
	for _, r := range all {
		head := r.Workload + " over " + profileOf(r.Link).String()
		if i := slices.IndexFunc(panels, func(p panel) bool { return p.head == head }); i >= 0 {
			panels[i].rows = append(panels[i].rows, r)
		} else {
			panels = append(panels, panel{head, []result{r}})
		}
	}
	var body bytes.Buffer
	y := plotMargin
	for _, p := range panels {
		y += plotTitle
		fmt.Fprintf(&body, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", plotMargin, y-10, escape(p.head))
		longest := slices.MaxFunc(p.rows, func(a, b result) int { return int(a.Ready - b.Ready) }).Ready.Seconds()
		for _, r := range p.rows {
			width := r.Ready.Seconds() / max(longest, 0.001) * (plotWidth - plotLabel - plotValue - plotMargin)
			fmt.Fprintf(&body, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>", plotLabel-8, y+plotBar-3, escape(title(r.Mode)))
			fmt.Fprintf(&body, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>", plotLabel, y, width, plotBar, colours[r.Mode])
			fmt.Fprintf(&body, "<text x=\"%.1f\" y=\"%d\">%.2f s, %s</text>\n", plotLabel+width+6, y+plotBar-3, r.Ready.Seconds(), escape(mb(r.Down)))
			y += plotBar + plotGap
		}
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", plotWidth, y+plotMargin)
	fmt.Fprintf(&out, "<title>Cold start to ready, and bytes over the link until then</title>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n%s</svg>\n", body.Bytes())
	return out.Bytes()
}

func profileOf(link string) linksim.Profile {
	for _, l := range links {
		if l.name == link {
			return l.profile
		}
	}
	return linksim.Profile{}
}

func escape(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // a buffer takes all
	return b.String()
}
