package main

import (
	"errors"

	"github.com/spf13/cobra"
)

type umountOptions struct {
	*global
	lazy   lazyFlags
	detach bool
}

func newUmount(g *global) *cobra.Command {
	o := &umountOptions{global: g}
	cmd := &cobra.Command{
		Use:   "umount DIR…",
		Short: "Unmount what mount has mounted",
		Long: `umount takes the mount off each directory and returns when the daemon has let go of it. What was
fetched stays in the state directory for the next mount. umount(8) does the same, and the daemon sees it.`,
		Example: `  optimizer umount /mnt
  optimizer umount --lazy /mnt   # in use: it disappears now, and ends with its last user`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef(cmd, "want a directory")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.lazy.client()
			var errs []error
			for _, dir := range args {
				if err == nil {
					errs = append(errs, c.Unmount(cmd.Context(), dir, o.detach))
				}
			}
			return errors.Join(append(errs, err)...)
		},
	}
	o.lazy.addFlags(cmd)
	cmd.Flags().BoolVarP(&o.detach, "lazy", "l", false, "also when it is in use")
	return cmd
}
